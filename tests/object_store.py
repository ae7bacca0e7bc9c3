"""An S3-compatible server in this process."""

from collections.abc import Iterator
from contextlib import contextmanager

BUCKET = "bucket"


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Serve a bucket; yields the variables by which any S3 client finds it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    import s3fs

    environ = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "eu-central-1",
    }
    try:
        s3fs.S3FileSystem(**options(environ)).makedirs(BUCKET, exist_ok=True)
        yield environ
    finally:
        server.stop()


def options(environ: dict[str, str]) -> dict[str, object]:
    """The same for `open_store`."""
    return {
        "endpoint_url": environ["AWS_ENDPOINT_URL"],
        "key": environ["AWS_ACCESS_KEY_ID"],
        "secret": environ["AWS_SECRET_ACCESS_KEY"],
        "client_kwargs": {"region_name": environ["AWS_DEFAULT_REGION"]},
    }
