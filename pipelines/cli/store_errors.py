"""Exceptions of object stores as one-line messages.

Store packages raise their own exceptions, or OSError caused by one, after their file systems have retried.
"""

from weighted_mtp.pipelines.cli.usage import causes, one_line
from weighted_mtp.schemas.configs import Config

PACKAGES = {
    "aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "httpcore", "httpx", "httpx2", "huggingface_hub",
    "requests", "s3fs", "urllib3",
}  # fmt: skip
AWS_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
CONNECTION = "check the network, and the endpoint if one is set (AWS_ENDPOINT_URL, HF_ENDPOINT)"
STORE_REMEDIES = {
    "NoCredentialsError": AWS_CREDENTIALS,
    "PartialCredentialsError": AWS_CREDENTIALS,
    "ProfileNotFound": AWS_CREDENTIALS,
    "DefaultCredentialsError": "set GOOGLE_APPLICATION_CREDENTIALS, or run 'gcloud auth application-default login'",
    "PermissionError": "check the credentials and their permissions",
    "FileNotFoundError": "check the address, and that the bucket exists",
    "HfUriError": "check the address",
    "ParamValidationError": "check the address",
    "ConnectionError": CONNECTION,
    "ConnectError": CONNECTION,
    "ClientConnectorError": CONNECTION,
    "TimeoutError": CONNECTION,
}
"""Remedies by the name of the exception class or a base class."""


def is_store_error(error: BaseException) -> bool:
    """Whether an exception or one of its causes comes from a store package."""
    return any(type(cause).__module__.split(".")[0] in PACKAGES for cause in causes(error))


def describe_store_error(error: Exception, config: Config | None) -> str:
    """Describe the addresses, the store's error and the remedy in one line."""
    where = ", ".join(addresses(config))
    what = one_line(getattr(error, "strerror", None) or str(error)) or type(error).__name__
    classes = (kind.__name__ for cause in causes(error) for kind in type(cause).__mro__)
    remedy = next((STORE_REMEDIES[name] for name in classes if name in STORE_REMEDIES), "rerun the same command")
    return f"{where}: {what}; {remedy}" if where else f"{what}; {remedy}"


def addresses(config: Config | None) -> list[str]:
    """The store addresses among the settings."""
    if config is None:
        return []
    values = (getattr(config, name) for name in type(config).model_fields)
    flat = (str(part) for value in values for part in (value if isinstance(value, list | tuple) else [value]))
    return [value for value in flat if "://" in value]
