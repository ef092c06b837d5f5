"""What turns observations into the model's inputs, apart from the model: in a process that has none, too."""

from __future__ import annotations

from dataclasses import dataclass

from policy_server.errors import BadRequest
from policy_server.observation import Observed
from policy_server.vla.preprocessing import BadInput, Prepared, Preprocessor


@dataclass(frozen=True, kw_only=True)
class Preparer:
    """camera: the name of the image that the model reads."""

    preprocessor: Preprocessor
    camera: str

    def __call__(self, observed: Observed) -> Prepared:
        """Raises BadRequest."""
        try:
            return self.preprocessor.prepare(observed.images[self.camera], observed.instruction, observed.state_S)
        except BadInput as error:
            field = f"images[{self.camera}]" if error.field == "image" else error.field
            message = str(error).removeprefix(f"{error.field}: ")
            raise BadRequest(message, field=f"observation.{field}") from error
