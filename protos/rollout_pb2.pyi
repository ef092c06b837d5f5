from protos import episode_pb2 as _episode_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Rollout(_message.Message):
    __slots__ = ("rollout_id", "task", "initial_state", "purpose", "version", "temperature", "seed", "noise_correlation", "session_id")
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    INITIAL_STATE_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NOISE_CORRELATION_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    task: str
    initial_state: str
    purpose: _episode_pb2.Purpose
    version: int
    temperature: float
    seed: int
    noise_correlation: float
    session_id: str
    def __init__(self, rollout_id: _Optional[str] = ..., task: _Optional[str] = ..., initial_state: _Optional[str] = ..., purpose: _Optional[_Union[_episode_pb2.Purpose, str]] = ..., version: _Optional[int] = ..., temperature: _Optional[float] = ..., seed: _Optional[int] = ..., noise_correlation: _Optional[float] = ..., session_id: _Optional[str] = ...) -> None: ...

class EnqueueRolloutsRequest(_message.Message):
    __slots__ = ("rollouts",)
    ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    rollouts: _containers.RepeatedCompositeFieldContainer[Rollout]
    def __init__(self, rollouts: _Optional[_Iterable[_Union[Rollout, _Mapping]]] = ...) -> None: ...

class EnqueueRolloutsReply(_message.Message):
    __slots__ = ("added",)
    ADDED_FIELD_NUMBER: _ClassVar[int]
    added: int
    def __init__(self, added: _Optional[int] = ...) -> None: ...

class CancelRolloutsRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class CancelRolloutsReply(_message.Message):
    __slots__ = ("cancelled",)
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    cancelled: int
    def __init__(self, cancelled: _Optional[int] = ...) -> None: ...

class GetQueueRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class QueueStatus(_message.Message):
    __slots__ = ("waiting", "leased", "done", "set_aside", "workers")
    WAITING_FIELD_NUMBER: _ClassVar[int]
    LEASED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    SET_ASIDE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    waiting: int
    leased: int
    done: int
    set_aside: _containers.RepeatedCompositeFieldContainer[SetAside]
    workers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, waiting: _Optional[int] = ..., leased: _Optional[int] = ..., done: _Optional[int] = ..., set_aside: _Optional[_Iterable[_Union[SetAside, _Mapping]]] = ..., workers: _Optional[_Iterable[str]] = ...) -> None: ...

class SetAside(_message.Message):
    __slots__ = ("rollout", "errors")
    ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    rollout: Rollout
    errors: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, rollout: _Optional[_Union[Rollout, _Mapping]] = ..., errors: _Optional[_Iterable[str]] = ...) -> None: ...

class LeaseRolloutRequest(_message.Message):
    __slots__ = ("worker", "can_run", "holds", "only_held", "wait_ms")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    CAN_RUN_FIELD_NUMBER: _ClassVar[int]
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    ONLY_HELD_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    can_run: _containers.RepeatedScalarFieldContainer[str]
    holds: _containers.RepeatedScalarFieldContainer[str]
    only_held: bool
    wait_ms: int
    def __init__(self, worker: _Optional[str] = ..., can_run: _Optional[_Iterable[str]] = ..., holds: _Optional[_Iterable[str]] = ..., only_held: bool = ..., wait_ms: _Optional[int] = ...) -> None: ...

class LeaseRolloutReply(_message.Message):
    __slots__ = ("rollout", "lease_id", "lease_ms")
    ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    rollout: Rollout
    lease_id: str
    lease_ms: int
    def __init__(self, rollout: _Optional[_Union[Rollout, _Mapping]] = ..., lease_id: _Optional[str] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class RenewLeaseRequest(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    def __init__(self, lease_id: _Optional[str] = ...) -> None: ...

class RenewLeaseReply(_message.Message):
    __slots__ = ("held",)
    HELD_FIELD_NUMBER: _ClassVar[int]
    held: bool
    def __init__(self, held: bool = ...) -> None: ...

class ReturnLeaseRequest(_message.Message):
    __slots__ = ("lease_id", "error")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    error: str
    def __init__(self, lease_id: _Optional[str] = ..., error: _Optional[str] = ...) -> None: ...

class ReturnLeaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StreamEpisodesRequest(_message.Message):
    __slots__ = ("cursor", "run", "follow", "session_id")
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    cursor: int
    run: str
    follow: bool
    session_id: str
    def __init__(self, cursor: _Optional[int] = ..., run: _Optional[str] = ..., follow: bool = ..., session_id: _Optional[str] = ...) -> None: ...

class EpisodePart(_message.Message):
    __slots__ = ("sequence", "record", "damaged")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    record: _episode_pb2.EpisodeRecord
    damaged: str
    def __init__(self, sequence: _Optional[int] = ..., record: _Optional[_Union[_episode_pb2.EpisodeRecord, _Mapping]] = ..., damaged: _Optional[str] = ...) -> None: ...

class CommitCursorRequest(_message.Message):
    __slots__ = ("reader", "cursor", "leave")
    READER_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    reader: str
    cursor: int
    leave: bool
    def __init__(self, reader: _Optional[str] = ..., cursor: _Optional[int] = ..., leave: bool = ...) -> None: ...

class CommitCursorReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
