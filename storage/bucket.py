"""Whether an object store answers and has the bucket that is meant: asked first, since it is soon asked."""

from typing import Any

from saescale.storage.errors import SaescaleError, Unavailable, one_line

# Elsewhere an object store that fails is asked again for half a minute, which a wrong address is not worth.
_ONCE: dict[str, Any] = {"connect_timeout": 4, "read_timeout": 8, "retries": {"total_max_attempts": 1}}
_answered: set[tuple[str, str]] = set()  # buckets that this process need not ask for again


def require_bucket(fs: Any, path: str, url: str) -> None:
    """Asks an object store (S3) for the bucket of `url`, once in a process and in seconds.

    Raises SaescaleError where there is none, and Unavailable where nothing answers. Who may not ask, or is asked for
    credentials, hears of that when it reads or writes.
    """
    if not hasattr(fs, "call_s3"):
        return
    bucket = fs.split_path(path)[0]
    key = (str(fs._fs_token), bucket)
    if not bucket or key in _answered:
        return
    from botocore.exceptions import ConnectionError, HTTPClientError  # type: ignore[import-untyped]

    quick = type(fs)(**{**fs.storage_options, "config_kwargs": _ONCE}, skip_instance_cache=True)
    quick.retries = 1
    try:
        quick.call_s3("head_bucket", Bucket=bucket)
    except FileNotFoundError as error:
        raise SaescaleError(f"there is no bucket {bucket} for {url}; create it, or correct the address") from error
    except (ConnectionError, HTTPClientError, TimeoutError) as error:
        raise Unavailable(
            f"the object store of {url} does not answer: {one_line(error)}; check its address (AWS_ENDPOINT_URL) and "
            "the network"
        ) from error
    except Exception:
        return
    _answered.add(key)
