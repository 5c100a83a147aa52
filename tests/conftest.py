"""Fixtures that several floors share."""

import os
import uuid
from collections.abc import Iterator

import pytest

from tests.s3_faults import Faults

# Before torch is imported, here and in the processes that tests start: threads that spin while they wait make
# two busy processes on two cores ten times as slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[str, Faults]]:
    """A real S3 protocol server on loopback, and what can go wrong with it; AWS_* point every client to it."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    server._server.app = faults = Faults(server._server.app)
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        boto3.client("s3").create_bucket(Bucket="saescale")
        yield endpoint, faults
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="session")
def s3_endpoint(s3_server: tuple[str, Faults]) -> str:
    """The address of the S3 server."""
    return s3_server[0]


@pytest.fixture
def s3_faults(s3_server: tuple[str, Faults]) -> Faults:
    """Makes the S3 server fail at times."""
    return s3_server[1]


@pytest.fixture
def s3_url(s3_endpoint: str) -> str:
    """A fresh prefix in a bucket of a real S3 protocol server."""
    return f"s3://saescale/{uuid.uuid4().hex}"
