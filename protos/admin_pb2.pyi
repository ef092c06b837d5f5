from protos import episode_pb2 as _episode_pb2
from protos import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WeightsKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WEIGHTS_KIND_UNSPECIFIED: _ClassVar[WeightsKind]
    WEIGHTS_KIND_FULL: _ClassVar[WeightsKind]
    WEIGHTS_KIND_LORA: _ClassVar[WeightsKind]

class ServerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SERVER_STATE_UNSPECIFIED: _ClassVar[ServerState]
    SERVER_STATE_WARMING: _ClassVar[ServerState]
    SERVER_STATE_SERVING: _ClassVar[ServerState]
    SERVER_STATE_DRAINING: _ClassVar[ServerState]
    SERVER_STATE_ASLEEP: _ClassVar[ServerState]
WEIGHTS_KIND_UNSPECIFIED: WeightsKind
WEIGHTS_KIND_FULL: WeightsKind
WEIGHTS_KIND_LORA: WeightsKind
SERVER_STATE_UNSPECIFIED: ServerState
SERVER_STATE_WARMING: ServerState
SERVER_STATE_SERVING: ServerState
SERVER_STATE_DRAINING: ServerState
SERVER_STATE_ASLEEP: ServerState

class WeightsHeader(_message.Message):
    __slots__ = ("kind", "base_fingerprint", "parent", "sha256", "bytes", "adapter_config", "note", "set_live")
    KIND_FIELD_NUMBER: _ClassVar[int]
    BASE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_CONFIG_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    SET_LIVE_FIELD_NUMBER: _ClassVar[int]
    kind: WeightsKind
    base_fingerprint: str
    parent: int
    sha256: str
    bytes: int
    adapter_config: str
    note: str
    set_live: bool
    def __init__(self, kind: _Optional[_Union[WeightsKind, str]] = ..., base_fingerprint: _Optional[str] = ..., parent: _Optional[int] = ..., sha256: _Optional[str] = ..., bytes: _Optional[int] = ..., adapter_config: _Optional[str] = ..., note: _Optional[str] = ..., set_live: bool = ...) -> None: ...

class PublishWeightsRequest(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: WeightsHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[WeightsHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class PublishWeightsReply(_message.Message):
    __slots__ = ("version", "device_fingerprint")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    version: int
    device_fingerprint: str
    def __init__(self, version: _Optional[int] = ..., device_fingerprint: _Optional[str] = ...) -> None: ...

class SetLiveRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class SetLiveReply(_message.Message):
    __slots__ = ("previous",)
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    previous: int
    def __init__(self, previous: _Optional[int] = ...) -> None: ...

class ListVersionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListVersionsReply(_message.Message):
    __slots__ = ("live", "versions")
    LIVE_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    live: int
    versions: _containers.RepeatedCompositeFieldContainer[VersionInfo]
    def __init__(self, live: _Optional[int] = ..., versions: _Optional[_Iterable[_Union[VersionInfo, _Mapping]]] = ...) -> None: ...

class VersionInfo(_message.Message):
    __slots__ = ("version", "parent", "kind", "note", "published_unix_ns", "device_fingerprint", "open_episodes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    OPEN_EPISODES_FIELD_NUMBER: _ClassVar[int]
    version: int
    parent: int
    kind: WeightsKind
    note: str
    published_unix_ns: int
    device_fingerprint: str
    open_episodes: int
    def __init__(self, version: _Optional[int] = ..., parent: _Optional[int] = ..., kind: _Optional[_Union[WeightsKind, str]] = ..., note: _Optional[str] = ..., published_unix_ns: _Optional[int] = ..., device_fingerprint: _Optional[str] = ..., open_episodes: _Optional[int] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("observation", "token_ids")
    OBSERVATION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    observation: _episode_pb2.Observation
    token_ids: _tensor_pb2.Tensor
    def __init__(self, observation: _Optional[_Union[_episode_pb2.Observation, _Mapping]] = ..., token_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ScoreProbeRequest(_message.Message):
    __slots__ = ("version", "probes", "temperature")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    version: int
    probes: _containers.RepeatedCompositeFieldContainer[Probe]
    temperature: float
    def __init__(self, version: _Optional[int] = ..., probes: _Optional[_Iterable[_Union[Probe, _Mapping]]] = ..., temperature: _Optional[float] = ...) -> None: ...

class ScoreProbeReply(_message.Message):
    __slots__ = ("token_logprobs",)
    TOKEN_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_logprobs: _tensor_pb2.Tensor
    def __init__(self, token_logprobs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServerStatus(_message.Message):
    __slots__ = ("state", "model", "live_version", "uptime_s", "open_episodes", "waiting", "queue", "successes", "failures", "errors", "drain_left_s")
    STATE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LIVE_VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    OPEN_EPISODES_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    SUCCESSES_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_LEFT_S_FIELD_NUMBER: _ClassVar[int]
    state: ServerState
    model: str
    live_version: int
    uptime_s: float
    open_episodes: int
    waiting: int
    queue: int
    successes: int
    failures: int
    errors: int
    drain_left_s: float
    def __init__(self, state: _Optional[_Union[ServerState, str]] = ..., model: _Optional[str] = ..., live_version: _Optional[int] = ..., uptime_s: _Optional[float] = ..., open_episodes: _Optional[int] = ..., waiting: _Optional[int] = ..., queue: _Optional[int] = ..., successes: _Optional[int] = ..., failures: _Optional[int] = ..., errors: _Optional[int] = ..., drain_left_s: _Optional[float] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("within_s",)
    WITHIN_S_FIELD_NUMBER: _ClassVar[int]
    within_s: float
    def __init__(self, within_s: _Optional[float] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("open_episodes",)
    OPEN_EPISODES_FIELD_NUMBER: _ClassVar[int]
    open_episodes: int
    def __init__(self, open_episodes: _Optional[int] = ...) -> None: ...

class SleepRequest(_message.Message):
    __slots__ = ("within_s",)
    WITHIN_S_FIELD_NUMBER: _ClassVar[int]
    within_s: float
    def __init__(self, within_s: _Optional[float] = ...) -> None: ...

class SleepReply(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...

class WakeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WakeReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
