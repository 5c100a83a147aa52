"""What is secret in an address stays out of all that is said and written."""

import pickle
import warnings
from pathlib import Path

import pytest

from saescale.cluster.front.console import console
from saescale.scaling.tables import Table
from saescale.storage import files
from saescale.storage.errors import SaescaleError, SaescaleWarning, Unavailable, one_line
from saescale.storage.rundir import RunDirectory
from saescale.storage.secrets import hide_secrets, secret_in_url

WITH_SECRETS = {
    "https://h/x.jsonl?token=HUSH&v=1": "https://h/x.jsonl?token=***&v=1",
    "https://b.s3.amazonaws.com/x?X-Amz-Credential=HUSH%2Fus&X-Amz-Date=3&X-Amz-Signature=HUSH":
        "https://b.s3.amazonaws.com/x?X-Amz-Credential=***&X-Amz-Date=3&X-Amz-Signature=***",
    "https://a.blob.core.windows.net/c/x?sv=2&sig=HUSH%3D&se=9": "https://a.blob.core.windows.net/c/x?sv=2&sig=***&se=9",
    "s3://me:HUSH@bucket/x": "s3://***@bucket/x",
    "s3://me:HU/SH@bucket/x": "s3://***@bucket/x",
    "ftp://me:HU@SH@host:21/x": "ftp://***@host:21/x",
    "https://HUSH@host/x": "https://***@host/x",
    "simplecache::https://me:HUSH@host/x.gz": "simplecache::https://***@host/x.gz",
    "http://h/x#access_token=HUSH": "http://h/x#access_token=***",
}  # fmt: skip
WITHOUT = [
    "s3://bucket/keys=3/x.txt", "ftp://me@host/x", "http://host:8265/a@b", "https://h/x?v=1&list=2", "ray://h:10001",
    "not one: n=3, token=5; key=4?", "C:\\corpus\\x.txt", "a@b.org: what is https://h?",
]  # fmt: skip


@pytest.mark.parametrize(("given", "shown"), WITH_SECRETS.items())
def test_what_is_secret_in_an_address_is_hidden_everywhere(
    given: str, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hide_secrets(given) == shown == hide_secrets(shown)
    assert secret_in_url(given) is not None
    said = f"cannot read {shown} (3 tries)"
    for kind in (SaescaleError, Unavailable, SaescaleWarning):
        error = kind(f"cannot read {given} (3 tries)")
        assert str(error) == str(pickle.loads(pickle.dumps(error))) == said
    assert one_line(ValueError(f"404, url='{given}'")) == f"404, url='{shown}'"
    with warnings.catch_warnings(record=True) as found:
        warnings.warn(f"cannot read {given} (3 tries)", SaescaleWarning, stacklevel=1)
    assert str(found[0].message) == said
    run = RunDirectory(str(tmp_path))
    run.write_json("fits.json", {"source": given, "fits": [{"from": (given,)}]})
    assert "HUSH" not in (tmp_path / "fits.json").read_text()
    assert run.read_json("fits.json") == {"source": shown, "fits": [{"from": [shown]}]}
    assert Table.from_rows([{"n_latents": 8}], source=given).source == shown
    with console.capture() as printed:
        console.print(f"[bold]{given}[/]: done", soft_wrap=True, highlight=False)
    assert printed.get() == f"{shown}: done\n"


def test_what_follows_an_address_stays() -> None:
    assert hide_secrets("https://h/x?token=HUSH, line 2: no text") == "https://h/x?token=***, line 2: no text"
    assert hide_secrets("URL('https://h/x?token=HU.SH,HU')") == "URL('https://h/x?token=***')"


@pytest.mark.parametrize("given", WITHOUT)
def test_an_address_without_a_secret_stays_as_it_is(given: str) -> None:
    assert hide_secrets(given) == given
    assert secret_in_url(given) is None


def test_errors_of_file_systems_hide_the_address_that_they_hold() -> None:
    with pytest.raises(SaescaleError) as caught:
        files.read_bytes("http://me:HUSH@127.0.0.1:9/x?token=HUSH")
    assert "127.0.0.1:9/x?token=***" in str(caught.value)
    assert "HUSH" not in str(caught.value)
