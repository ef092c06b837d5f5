from protos import episode_pb2 as _episode_pb2
from protos import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetSpecRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Dimension(_message.Message):
    __slots__ = ("name", "unit", "low", "high")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    name: str
    unit: str
    low: float
    high: float
    def __init__(self, name: _Optional[str] = ..., unit: _Optional[str] = ..., low: _Optional[float] = ..., high: _Optional[float] = ...) -> None: ...

class ImageSpec(_message.Message):
    __slots__ = ("name", "height", "width", "resize")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    RESIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    height: int
    width: int
    resize: str
    def __init__(self, name: _Optional[str] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., resize: _Optional[str] = ...) -> None: ...

class ActionTokens(_message.Message):
    __slots__ = ("bins", "vocabulary", "low", "high", "mask")
    BINS_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    bins: int
    vocabulary: int
    low: _tensor_pb2.Tensor
    high: _tensor_pb2.Tensor
    mask: _tensor_pb2.Tensor
    def __init__(self, bins: _Optional[int] = ..., vocabulary: _Optional[int] = ..., low: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., high: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., mask: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class PolicySpec(_message.Message):
    __slots__ = ("model", "base_fingerprint", "action", "action_tokens", "chunk_length", "tick_rate_hz", "images", "state", "max_instruction_tokens", "max_image_bytes", "live_version", "versions", "image_path", "unnorm_key", "stores_episodes", "max_request_bytes", "max_request_ticks")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BASE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    ACTION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_LENGTH_FIELD_NUMBER: _ClassVar[int]
    TICK_RATE_HZ_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MAX_INSTRUCTION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIVE_VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_PATH_FIELD_NUMBER: _ClassVar[int]
    UNNORM_KEY_FIELD_NUMBER: _ClassVar[int]
    STORES_EPISODES_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_TICKS_FIELD_NUMBER: _ClassVar[int]
    model: str
    base_fingerprint: str
    action: _containers.RepeatedCompositeFieldContainer[Dimension]
    action_tokens: ActionTokens
    chunk_length: int
    tick_rate_hz: float
    images: _containers.RepeatedCompositeFieldContainer[ImageSpec]
    state: _containers.RepeatedCompositeFieldContainer[Dimension]
    max_instruction_tokens: int
    max_image_bytes: int
    live_version: int
    versions: _containers.RepeatedScalarFieldContainer[int]
    image_path: str
    unnorm_key: str
    stores_episodes: bool
    max_request_bytes: int
    max_request_ticks: int
    def __init__(self, model: _Optional[str] = ..., base_fingerprint: _Optional[str] = ..., action: _Optional[_Iterable[_Union[Dimension, _Mapping]]] = ..., action_tokens: _Optional[_Union[ActionTokens, _Mapping]] = ..., chunk_length: _Optional[int] = ..., tick_rate_hz: _Optional[float] = ..., images: _Optional[_Iterable[_Union[ImageSpec, _Mapping]]] = ..., state: _Optional[_Iterable[_Union[Dimension, _Mapping]]] = ..., max_instruction_tokens: _Optional[int] = ..., max_image_bytes: _Optional[int] = ..., live_version: _Optional[int] = ..., versions: _Optional[_Iterable[int]] = ..., image_path: _Optional[str] = ..., unnorm_key: _Optional[str] = ..., stores_episodes: bool = ..., max_request_bytes: _Optional[int] = ..., max_request_ticks: _Optional[int] = ...) -> None: ...

class StartEpisodeRequest(_message.Message):
    __slots__ = ("task", "initial_state", "purpose", "version", "follow_live", "temperature", "seed", "arm", "asset_tree", "tick_rate_hz", "request_id", "lease_id", "noise_correlation", "session_id")
    TASK_FIELD_NUMBER: _ClassVar[int]
    INITIAL_STATE_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_LIVE_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    ASSET_TREE_FIELD_NUMBER: _ClassVar[int]
    TICK_RATE_HZ_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    NOISE_CORRELATION_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    task: str
    initial_state: str
    purpose: _episode_pb2.Purpose
    version: int
    follow_live: bool
    temperature: float
    seed: int
    arm: str
    asset_tree: str
    tick_rate_hz: float
    request_id: str
    lease_id: str
    noise_correlation: float
    session_id: str
    def __init__(self, task: _Optional[str] = ..., initial_state: _Optional[str] = ..., purpose: _Optional[_Union[_episode_pb2.Purpose, str]] = ..., version: _Optional[int] = ..., follow_live: bool = ..., temperature: _Optional[float] = ..., seed: _Optional[int] = ..., arm: _Optional[str] = ..., asset_tree: _Optional[str] = ..., tick_rate_hz: _Optional[float] = ..., request_id: _Optional[str] = ..., lease_id: _Optional[str] = ..., noise_correlation: _Optional[float] = ..., session_id: _Optional[str] = ...) -> None: ...

class StartEpisodeReply(_message.Message):
    __slots__ = ("episode_id", "version", "seed")
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    episode_id: str
    version: int
    seed: int
    def __init__(self, episode_id: _Optional[str] = ..., version: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class ActRequest(_message.Message):
    __slots__ = ("episode_id", "decision", "observation", "executed")
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    OBSERVATION_FIELD_NUMBER: _ClassVar[int]
    EXECUTED_FIELD_NUMBER: _ClassVar[int]
    episode_id: str
    decision: int
    observation: _episode_pb2.Observation
    executed: _containers.RepeatedCompositeFieldContainer[_episode_pb2.Tick]
    def __init__(self, episode_id: _Optional[str] = ..., decision: _Optional[int] = ..., observation: _Optional[_Union[_episode_pb2.Observation, _Mapping]] = ..., executed: _Optional[_Iterable[_Union[_episode_pb2.Tick, _Mapping]]] = ...) -> None: ...

class ActReply(_message.Message):
    __slots__ = ("episode_id", "decision", "capture_time_ns", "chunk", "refusal")
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_TIME_NS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    episode_id: str
    decision: int
    capture_time_ns: int
    chunk: _episode_pb2.Chunk
    refusal: Refusal
    def __init__(self, episode_id: _Optional[str] = ..., decision: _Optional[int] = ..., capture_time_ns: _Optional[int] = ..., chunk: _Optional[_Union[_episode_pb2.Chunk, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "field", "message", "retry_after_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: int
    field: str
    message: str
    retry_after_ms: int
    def __init__(self, code: _Optional[int] = ..., field: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class EndEpisodeRequest(_message.Message):
    __slots__ = ("episode_id", "outcome", "terminal", "executed", "final_observation", "message")
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    TERMINAL_FIELD_NUMBER: _ClassVar[int]
    EXECUTED_FIELD_NUMBER: _ClassVar[int]
    FINAL_OBSERVATION_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    episode_id: str
    outcome: _episode_pb2.Outcome
    terminal: bool
    executed: _containers.RepeatedCompositeFieldContainer[_episode_pb2.Tick]
    final_observation: _episode_pb2.Observation
    message: str
    def __init__(self, episode_id: _Optional[str] = ..., outcome: _Optional[_Union[_episode_pb2.Outcome, str]] = ..., terminal: bool = ..., executed: _Optional[_Iterable[_Union[_episode_pb2.Tick, _Mapping]]] = ..., final_observation: _Optional[_Union[_episode_pb2.Observation, _Mapping]] = ..., message: _Optional[str] = ...) -> None: ...

class EndEpisodeReply(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...
