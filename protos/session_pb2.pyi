from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SESSION_STATE_UNSPECIFIED: _ClassVar[SessionState]
    SESSION_STATE_RUNNING: _ClassVar[SessionState]
    SESSION_STATE_PAUSED: _ClassVar[SessionState]
    SESSION_STATE_STOPPED: _ClassVar[SessionState]

class Control(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONTROL_UNSPECIFIED: _ClassVar[Control]
    CONTROL_PROMOTE: _ClassVar[Control]
    CONTROL_ROLL_BACK: _ClassVar[Control]
    CONTROL_PAUSE: _ClassVar[Control]
    CONTROL_RESUME: _ClassVar[Control]
    CONTROL_STOP: _ClassVar[Control]
SESSION_STATE_UNSPECIFIED: SessionState
SESSION_STATE_RUNNING: SessionState
SESSION_STATE_PAUSED: SessionState
SESSION_STATE_STOPPED: SessionState
CONTROL_UNSPECIFIED: Control
CONTROL_PROMOTE: Control
CONTROL_ROLL_BACK: Control
CONTROL_PAUSE: Control
CONTROL_RESUME: Control
CONTROL_STOP: Control

class GateRule(_message.Message):
    __slots__ = ("margin", "promote_error", "rollback_error", "trouble_error", "trouble_rise", "share", "max_episodes", "envelope")
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    PROMOTE_ERROR_FIELD_NUMBER: _ClassVar[int]
    ROLLBACK_ERROR_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_ERROR_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_RISE_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    MAX_EPISODES_FIELD_NUMBER: _ClassVar[int]
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    margin: float
    promote_error: float
    rollback_error: float
    trouble_error: float
    trouble_rise: float
    share: float
    max_episodes: int
    envelope: float
    def __init__(self, margin: _Optional[float] = ..., promote_error: _Optional[float] = ..., rollback_error: _Optional[float] = ..., trouble_error: _Optional[float] = ..., trouble_rise: _Optional[float] = ..., share: _Optional[float] = ..., max_episodes: _Optional[int] = ..., envelope: _Optional[float] = ...) -> None: ...

class StartSessionRequest(_message.Message):
    __slots__ = ("session_id", "task", "base_version", "temperature", "noise_correlation", "rule")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    NOISE_CORRELATION_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    task: str
    base_version: int
    temperature: float
    noise_correlation: float
    rule: GateRule
    def __init__(self, session_id: _Optional[str] = ..., task: _Optional[str] = ..., base_version: _Optional[int] = ..., temperature: _Optional[float] = ..., noise_correlation: _Optional[float] = ..., rule: _Optional[_Union[GateRule, _Mapping]] = ...) -> None: ...

class Tally(_message.Message):
    __slots__ = ("episodes", "successes", "interventions", "ticks", "holds", "clips", "errors")
    EPISODES_FIELD_NUMBER: _ClassVar[int]
    SUCCESSES_FIELD_NUMBER: _ClassVar[int]
    INTERVENTIONS_FIELD_NUMBER: _ClassVar[int]
    TICKS_FIELD_NUMBER: _ClassVar[int]
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    CLIPS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    episodes: int
    successes: int
    interventions: int
    ticks: int
    holds: int
    clips: int
    errors: int
    def __init__(self, episodes: _Optional[int] = ..., successes: _Optional[int] = ..., interventions: _Optional[int] = ..., ticks: _Optional[int] = ..., holds: _Optional[int] = ..., clips: _Optional[int] = ..., errors: _Optional[int] = ...) -> None: ...

class VersionTally(_message.Message):
    __slots__ = ("version", "tally")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TALLY_FIELD_NUMBER: _ClassVar[int]
    version: int
    tally: Tally
    def __init__(self, version: _Optional[int] = ..., tally: _Optional[_Union[Tally, _Mapping]] = ...) -> None: ...

class SessionEpisode(_message.Message):
    __slots__ = ("episode_id", "version", "success", "intervened", "ticks", "holds", "clips", "unix_ns", "error")
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    INTERVENED_FIELD_NUMBER: _ClassVar[int]
    TICKS_FIELD_NUMBER: _ClassVar[int]
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    CLIPS_FIELD_NUMBER: _ClassVar[int]
    UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    episode_id: str
    version: int
    success: bool
    intervened: bool
    ticks: int
    holds: int
    clips: int
    unix_ns: int
    error: bool
    def __init__(self, episode_id: _Optional[str] = ..., version: _Optional[int] = ..., success: bool = ..., intervened: bool = ..., ticks: _Optional[int] = ..., holds: _Optional[int] = ..., clips: _Optional[int] = ..., unix_ns: _Optional[int] = ..., error: bool = ...) -> None: ...

class SessionEvent(_message.Message):
    __slots__ = ("unix_ns", "what", "version", "by", "reason")
    UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    unix_ns: int
    what: str
    version: int
    by: str
    reason: str
    def __init__(self, unix_ns: _Optional[int] = ..., what: _Optional[str] = ..., version: _Optional[int] = ..., by: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Session(_message.Message):
    __slots__ = ("session_id", "task", "base_version", "temperature", "noise_correlation", "rule", "state", "live_version", "candidate_version", "past_versions", "live", "candidate", "standing", "versions", "open_episodes", "started_unix_ns", "log", "episodes")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    NOISE_CORRELATION_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LIVE_VERSION_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_VERSION_FIELD_NUMBER: _ClassVar[int]
    PAST_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    STANDING_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    OPEN_EPISODES_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    EPISODES_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    task: str
    base_version: int
    temperature: float
    noise_correlation: float
    rule: GateRule
    state: SessionState
    live_version: int
    candidate_version: int
    past_versions: _containers.RepeatedScalarFieldContainer[int]
    live: Tally
    candidate: Tally
    standing: str
    versions: _containers.RepeatedCompositeFieldContainer[VersionTally]
    open_episodes: int
    started_unix_ns: int
    log: _containers.RepeatedCompositeFieldContainer[SessionEvent]
    episodes: _containers.RepeatedCompositeFieldContainer[SessionEpisode]
    def __init__(self, session_id: _Optional[str] = ..., task: _Optional[str] = ..., base_version: _Optional[int] = ..., temperature: _Optional[float] = ..., noise_correlation: _Optional[float] = ..., rule: _Optional[_Union[GateRule, _Mapping]] = ..., state: _Optional[_Union[SessionState, str]] = ..., live_version: _Optional[int] = ..., candidate_version: _Optional[int] = ..., past_versions: _Optional[_Iterable[int]] = ..., live: _Optional[_Union[Tally, _Mapping]] = ..., candidate: _Optional[_Union[Tally, _Mapping]] = ..., standing: _Optional[str] = ..., versions: _Optional[_Iterable[_Union[VersionTally, _Mapping]]] = ..., open_episodes: _Optional[int] = ..., started_unix_ns: _Optional[int] = ..., log: _Optional[_Iterable[_Union[SessionEvent, _Mapping]]] = ..., episodes: _Optional[_Iterable[_Union[SessionEpisode, _Mapping]]] = ...) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSessionsReply(_message.Message):
    __slots__ = ("sessions",)
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[Session]
    def __init__(self, sessions: _Optional[_Iterable[_Union[Session, _Mapping]]] = ...) -> None: ...

class GetSessionRequest(_message.Message):
    __slots__ = ("session_id", "with_episodes")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    WITH_EPISODES_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    with_episodes: bool
    def __init__(self, session_id: _Optional[str] = ..., with_episodes: bool = ...) -> None: ...

class OfferCandidateRequest(_message.Message):
    __slots__ = ("session_id", "version", "device_fingerprint")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    version: int
    device_fingerprint: str
    def __init__(self, session_id: _Optional[str] = ..., version: _Optional[int] = ..., device_fingerprint: _Optional[str] = ...) -> None: ...

class OfferCandidateReply(_message.Message):
    __slots__ = ("accepted", "reason", "session")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    reason: str
    session: Session
    def __init__(self, accepted: bool = ..., reason: _Optional[str] = ..., session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class ControlSessionRequest(_message.Message):
    __slots__ = ("session_id", "control", "note", "version")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CONTROL_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    control: Control
    note: str
    version: int
    def __init__(self, session_id: _Optional[str] = ..., control: _Optional[_Union[Control, str]] = ..., note: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...
