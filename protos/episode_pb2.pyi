from protos import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Source(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SOURCE_UNSPECIFIED: _ClassVar[Source]
    SOURCE_POLICY: _ClassVar[Source]
    SOURCE_BLEND: _ClassVar[Source]
    SOURCE_HOLD: _ClassVar[Source]
    SOURCE_HUMAN: _ClassVar[Source]
    SOURCE_EXPERT: _ClassVar[Source]

class Purpose(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PURPOSE_UNSPECIFIED: _ClassVar[Purpose]
    PURPOSE_TRAIN: _ClassVar[Purpose]
    PURPOSE_EVALUATE: _ClassVar[Purpose]
    PURPOSE_DEPLOY: _ClassVar[Purpose]
    PURPOSE_DEMONSTRATE: _ClassVar[Purpose]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_SUCCESS: _ClassVar[Outcome]
    OUTCOME_FAILURE: _ClassVar[Outcome]
    OUTCOME_ERROR: _ClassVar[Outcome]
SOURCE_UNSPECIFIED: Source
SOURCE_POLICY: Source
SOURCE_BLEND: Source
SOURCE_HOLD: Source
SOURCE_HUMAN: Source
SOURCE_EXPERT: Source
PURPOSE_UNSPECIFIED: Purpose
PURPOSE_TRAIN: Purpose
PURPOSE_EVALUATE: Purpose
PURPOSE_DEPLOY: Purpose
PURPOSE_DEMONSTRATE: Purpose
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_SUCCESS: Outcome
OUTCOME_FAILURE: Outcome
OUTCOME_ERROR: Outcome

class Observation(_message.Message):
    __slots__ = ("images", "state", "instruction", "capture_time_ns")
    class ImagesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Image
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Image, _Mapping]] = ...) -> None: ...
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_TIME_NS_FIELD_NUMBER: _ClassVar[int]
    images: _containers.MessageMap[str, _tensor_pb2.Image]
    state: _tensor_pb2.Tensor
    instruction: str
    capture_time_ns: int
    def __init__(self, images: _Optional[_Mapping[str, _tensor_pb2.Image]] = ..., state: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., instruction: _Optional[str] = ..., capture_time_ns: _Optional[int] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_ms", "prepare_ms", "vision_ms", "prefill_ms", "decode_ms", "batch_size")
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    PREPARE_MS_FIELD_NUMBER: _ClassVar[int]
    VISION_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_MS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    prepare_ms: float
    vision_ms: float
    prefill_ms: float
    decode_ms: float
    batch_size: int
    def __init__(self, queue_ms: _Optional[float] = ..., prepare_ms: _Optional[float] = ..., vision_ms: _Optional[float] = ..., prefill_ms: _Optional[float] = ..., decode_ms: _Optional[float] = ..., batch_size: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("actions", "token_ids", "token_logprobs", "version", "temperature", "timing")
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    actions: _tensor_pb2.Tensor
    token_ids: _tensor_pb2.Tensor
    token_logprobs: _tensor_pb2.Tensor
    version: int
    temperature: float
    timing: Timing
    def __init__(self, actions: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., token_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., token_logprobs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., version: _Optional[int] = ..., temperature: _Optional[float] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ...) -> None: ...

class Tick(_message.Message):
    __slots__ = ("decision", "index", "action", "source", "reason", "expert_action")
    DECISION_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXPERT_ACTION_FIELD_NUMBER: _ClassVar[int]
    decision: int
    index: int
    action: _containers.RepeatedScalarFieldContainer[float]
    source: Source
    reason: str
    expert_action: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, decision: _Optional[int] = ..., index: _Optional[int] = ..., action: _Optional[_Iterable[float]] = ..., source: _Optional[_Union[Source, str]] = ..., reason: _Optional[str] = ..., expert_action: _Optional[_Iterable[float]] = ...) -> None: ...

class EpisodeStart(_message.Message):
    __slots__ = ("episode_id", "task", "initial_state", "purpose", "version", "follow_live", "temperature", "seed", "base_fingerprint", "image_path", "unnorm_key", "asset_tree", "arm", "tick_rate_hz", "started_unix_ns", "state_names", "rollout_id", "noise_correlation", "session_id")
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    INITIAL_STATE_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_LIVE_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    BASE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_PATH_FIELD_NUMBER: _ClassVar[int]
    UNNORM_KEY_FIELD_NUMBER: _ClassVar[int]
    ASSET_TREE_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    TICK_RATE_HZ_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    STATE_NAMES_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    NOISE_CORRELATION_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    episode_id: str
    task: str
    initial_state: str
    purpose: Purpose
    version: int
    follow_live: bool
    temperature: float
    seed: int
    base_fingerprint: str
    image_path: str
    unnorm_key: str
    asset_tree: str
    arm: str
    tick_rate_hz: float
    started_unix_ns: int
    state_names: _containers.RepeatedScalarFieldContainer[str]
    rollout_id: str
    noise_correlation: float
    session_id: str
    def __init__(self, episode_id: _Optional[str] = ..., task: _Optional[str] = ..., initial_state: _Optional[str] = ..., purpose: _Optional[_Union[Purpose, str]] = ..., version: _Optional[int] = ..., follow_live: bool = ..., temperature: _Optional[float] = ..., seed: _Optional[int] = ..., base_fingerprint: _Optional[str] = ..., image_path: _Optional[str] = ..., unnorm_key: _Optional[str] = ..., asset_tree: _Optional[str] = ..., arm: _Optional[str] = ..., tick_rate_hz: _Optional[float] = ..., started_unix_ns: _Optional[int] = ..., state_names: _Optional[_Iterable[str]] = ..., rollout_id: _Optional[str] = ..., noise_correlation: _Optional[float] = ..., session_id: _Optional[str] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("decision", "observation", "chunk")
    DECISION_FIELD_NUMBER: _ClassVar[int]
    OBSERVATION_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    decision: int
    observation: Observation
    chunk: Chunk
    def __init__(self, decision: _Optional[int] = ..., observation: _Optional[_Union[Observation, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class Executed(_message.Message):
    __slots__ = ("ticks",)
    TICKS_FIELD_NUMBER: _ClassVar[int]
    ticks: _containers.RepeatedCompositeFieldContainer[Tick]
    def __init__(self, ticks: _Optional[_Iterable[_Union[Tick, _Mapping]]] = ...) -> None: ...

class EpisodeEnd(_message.Message):
    __slots__ = ("outcome", "terminal", "final_observation", "message", "ended_unix_ns")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    TERMINAL_FIELD_NUMBER: _ClassVar[int]
    FINAL_OBSERVATION_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ENDED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    terminal: bool
    final_observation: Observation
    message: str
    ended_unix_ns: int
    def __init__(self, outcome: _Optional[_Union[Outcome, str]] = ..., terminal: bool = ..., final_observation: _Optional[_Union[Observation, _Mapping]] = ..., message: _Optional[str] = ..., ended_unix_ns: _Optional[int] = ...) -> None: ...

class EpisodeRecord(_message.Message):
    __slots__ = ("start", "decision", "executed", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    EXECUTED_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: EpisodeStart
    decision: Decision
    executed: Executed
    end: EpisodeEnd
    def __init__(self, start: _Optional[_Union[EpisodeStart, _Mapping]] = ..., decision: _Optional[_Union[Decision, _Mapping]] = ..., executed: _Optional[_Union[Executed, _Mapping]] = ..., end: _Optional[_Union[EpisodeEnd, _Mapping]] = ...) -> None: ...
