"""What the exceptions of object stores mean to the user.

Their packages raise exceptions of their own, or OSError with one of their own as its cause. Retrying is over by then:
file systems do it themselves.
"""

from weighted_mtp.pipelines.cli.usage import causes, one_line
from weighted_mtp.schemas.configs import Config

PACKAGES = {
    "aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "httpcore", "httpx", "httpx2", "huggingface_hub",
    "requests", "s3fs", "urllib3",
}  # fmt: skip
AWS_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
CONNECTION = "check the network, and the endpoint if one is set (AWS_ENDPOINT_URL, HF_ENDPOINT)"
REMEDIES = {
    "NoCredentialsError": AWS_CREDENTIALS,
    "PartialCredentialsError": AWS_CREDENTIALS,
    "ProfileNotFound": AWS_CREDENTIALS,
    "DefaultCredentialsError": "set GOOGLE_APPLICATION_CREDENTIALS, or run 'gcloud auth application-default login'",
    "PermissionError": "check the credentials and what they may do",
    "FileNotFoundError": "check the address, and that the bucket exists",
    "ConnectionError": CONNECTION,
    "ConnectError": CONNECTION,
    "ClientConnectorError": CONNECTION,
    "TimeoutError": CONNECTION,
}
"""What to do about an exception, by the name of its class or of one that it derives from."""


def is_store_error(error: BaseException) -> bool:
    """Whether an exception, or what it was raised from, comes from the package of a store."""
    return any(type(cause).__module__.split(".")[0] in PACKAGES for cause in causes(error))


def store_sentence(error: Exception, config: Config | None) -> str:
    """One line: which addresses may be meant, what the store says, and what to do."""
    where = ", ".join(addresses(config))
    what = one_line(getattr(error, "strerror", None) or str(error)) or type(error).__name__
    classes = (kind.__name__ for cause in causes(error) for kind in type(cause).__mro__)
    remedy = next((REMEDIES[name] for name in classes if name in REMEDIES), "rerun the same command")
    return f"{where}: {what}; {remedy}" if where else f"{what}; {remedy}"


def addresses(config: Config | None) -> list[str]:
    """The settings that lie in a store."""
    if config is None:
        return []
    values = (getattr(config, name) for name in type(config).model_fields)
    flat = (str(part) for value in values for part in (value if isinstance(value, list) else [value]))
    return [value for value in flat if "://" in value]
