from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class DraftRequest(_message.Message):
    __slots__ = ("sequence", "position", "token_ids", "num_wanted", "ended", "with_probabilities", "temperature", "num_candidates", "cache_salt")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_WANTED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    WITH_PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    NUM_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    position: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_wanted: int
    ended: bool
    with_probabilities: bool
    temperature: float
    num_candidates: int
    cache_salt: str
    def __init__(self, sequence: _Optional[int] = ..., position: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., num_wanted: _Optional[int] = ..., ended: bool = ..., with_probabilities: bool = ..., temperature: _Optional[float] = ..., num_candidates: _Optional[int] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class DraftResponse(_message.Message):
    __slots__ = ("sequence", "position", "token_ids", "probabilities", "num_candidates", "candidate_ids", "candidate_probabilities")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    NUM_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_IDS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    position: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    probabilities: _containers.RepeatedScalarFieldContainer[float]
    num_candidates: int
    candidate_ids: _containers.RepeatedScalarFieldContainer[int]
    candidate_probabilities: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, sequence: _Optional[int] = ..., position: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., probabilities: _Optional[_Iterable[float]] = ..., num_candidates: _Optional[int] = ..., candidate_ids: _Optional[_Iterable[int]] = ..., candidate_probabilities: _Optional[_Iterable[float]] = ...) -> None: ...
