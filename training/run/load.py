"""Loading a finished training run."""

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.storage.locations import Location, locate
from weighted_mtp.training.model.mtp_model import MTPModel, load_model
from weighted_mtp.training.run.compatibility import run_record


def load_run(path: str | Location, *, trust_remote_code: bool = False) -> MTPModel:
    """Load the model of a finished training run with its heads, in float32 on the CPU, in evaluation mode.

    `MTPModel.forward` gives the weighted loss of all heads for packed rows, `MTPModel.trunk` is the Hugging Face model.
    Python code in its directory runs only with `trust_remote_code`.

    Raises:
        UserError: not a training run, not finished, or damaged.
    """
    if run_record(locate(path)) is None:
        raise UserError(f"{path}: not a training run; give the output directory of 'wmtp train'")
    return load_model(str(path), trust_remote_code=trust_remote_code).eval()
