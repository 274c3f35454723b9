"""The real client of the hub against a server that refuses, resets, cuts and explains itself: one error, a way out."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.loopback_hub import LoopbackHub, hub, point_client_at  # noqa: F401  # a fixture
from helpers.loopback_server import Request, Response, refusing_url
from helpers.page_values import made
from helpers.users_models import reference
from huggingface_hub import HfApi

import tl_adapters
from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.checkpoints.hub_client import HubError
from tl_adapters.checkpoints.model_files import CheckpointError
from tl_adapters.circuits.circuit import Circuit
from tl_adapters.errors import UserError
from tl_adapters.interop.hub import pull, push_to_hub

GATED = "Access to model user/repo is restricted. You must have access to it and be authenticated to access it."


@pytest.fixture(scope="module")
def adapters() -> AdapterSet:
    return reference(dtype=torch.float32).installed_adapters()


def gated(status: int) -> Response:
    return Response(json.dumps({"error": GATED}), status, {"X-Error-Code": "GatedRepo", "X-Error-Message": GATED})


LICENSE = r"Open http://127.0.0.1:\d+/user/repo in a browser, accept the license.*set HF_TOKEN.*hf auth login"
WRITE = "Set HF_TOKEN to a token that may write to user/repo.*hf auth login.*push again"
NETWORK = "Check the network.*call again"
HOSTILE = "\x1b]0;owned\x07 \u202ereversed " + "words " * 200
CASES: dict[str, tuple[Response, str, str]] = {
    "it hangs up": (Response(reset=True), NETWORK, NETWORK),
    "401": (
        Response('{"error": "Invalid username or password."}', 401),
        f"Invalid username.*{LICENSE}.*spelling",
        WRITE,
    ),
    "403, gated": (gated(403), f"403: Access to model user/repo is restricted.*{LICENSE}", WRITE),
    "401, gated": (gated(401), f"401: Access to model user/repo is restricted.*{LICENSE}", WRITE),
    "403": (Response('{"error": "No read access"}', 403), f"403: No read access.*{LICENSE}", WRITE),
    "404": (
        Response('{"error": "Repository not found"}', 404, {"X-Error-Code": "RepoNotFound"}),
        "404: Repository not found.*Check the spelling of user/repo and the revision.*private",
        "404: Repository not found.*Check the spelling",
    ),
    "404 without a word": (Response("", 404), "404.*Check the spelling", "404.*Check the spelling"),
    "429": (Response("", 429, {"Retry-After": "7"}), "429.*wait 7 seconds", "429.*wait 7 seconds"),
    "429, no number": (Response("", 429, {"Retry-After": "soon"}), "429.*wait some minutes", "429.*some minutes"),
    "500": (Response('{"error": "Internal"}', 500), "500: Internal.*fault is the hub's", "500: Internal.*the hub's"),
    "503 in HTML": (Response("<html>", 503, {"Content-Type": "text/html"}), "503.*fault is", "503.*fault is"),
    "hostile words": (
        Response(json.dumps({"error": HOSTILE}), 403),
        r"403: \\x1b\]0;owned\\x07 \\u202ereversed words.*\.\.\.\)",
        r"403: \\x1b\]0;owned\\x07 \\u202ereversed words.*\.\.\.\)",
    ),
    "a list for an error": (Response("[1]", 500), "500: Internal Server Error.*the hub's", "The fault is the hub's"),
    "no JSON at all": (Response("hello", 200), "no answer of a hub.*HF_ENDPOINT", "no answer of a hub"),
    "another JSON": (Response("[[]]", 200), "no answer of a hub.*HF_ENDPOINT", "no answer of a hub"),
}


def is_one_clear_line(error: BaseException) -> bool:
    text = str(error)
    return text.isprintable() and len(text) < 1_000 and "Traceback" not in text


@pytest.mark.parametrize("case", CASES)
def test_what_the_hub_answers_becomes_one_error(
    hub: LoopbackHub,  # noqa: F811
    adapters: AdapterSet,
    case: str,
    tmp_path: Path,
) -> None:
    answer, down, up = CASES[case]
    hub.fault = lambda request: answer
    for download in (lambda: pull("user/repo", tmp_path / "pulled"), lambda: Circuit.from_hub("user/repo")):
        with pytest.raises(CheckpointError, match=down) as caught:
            download()
        assert is_one_clear_line(caught.value)
    for upload in (lambda: push_to_hub(adapters, "user/repo"), lambda: made().push_to_hub("user/repo")):
        with pytest.raises(HubError, match=up) as refused:
            upload()
        assert is_one_clear_line(refused.value)
    assert not (tmp_path / "pulled").exists()


def test_a_license_that_is_on_no_list_is_refused_before_anything_is_made(
    hub: LoopbackHub,  # noqa: F811
    adapters: AdapterSet,
) -> None:
    refused = r"license no-such \(400: .*\"license\" must be one of \[apache-2.0, mit.*push again"
    with pytest.raises(HubError, match=refused) as caught:
        push_to_hub(adapters, "user/repo", license="no-such")
    assert is_one_clear_line(caught.value) and hub.files == {}
    card = "---\nlicense: no-such\n---\n"
    with pytest.raises(ValueError, match="must be one of"):  # nor does a commit take such a card
        HfApi().upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=new_repository())
    assert hub.files == {"user/cards": {}}
    push_to_hub(adapters, "user/repo", license="cc-by-nc-4.0")
    assert "README.md" in hub.files["user/repo"]


def new_repository() -> str:
    return str(HfApi().create_repo("user/cards").repo_id)


def test_nobody_listens(adapters: AdapterSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refusing_url() as url:
        point_client_at(url, tmp_path, monkeypatch)
        with pytest.raises(CheckpointError, match=NETWORK):
            AdapterSet.from_pretrained("user/repo")
        with pytest.raises(HubError, match=NETWORK):
            push_to_hub(adapters, "user/repo")
        with pytest.raises(HubError, match=NETWORK):
            made().push_to_hub("user/repo")


def test_a_revision_that_is_not_there(hub: LoopbackHub, adapters: AdapterSet) -> None:  # noqa: F811
    push_to_hub(adapters, "user/repo")
    with pytest.raises(CheckpointError, match="404: Invalid rev id: seed-9.*has no such revision"):
        AdapterSet.from_pretrained("user/repo", revision="seed-9")


def cut_in_half(hub: LoopbackHub, file: str) -> None:  # noqa: F811
    """From now on the hub hangs up when it has sent half of a file."""

    def cut(request: Request) -> Response | None:
        if request.method != "GET" or not request.path.endswith(file):
            return None
        sent = hub._file(request, request.path)
        half = len(hub.files["user/repo"][file]) // 2
        return Response(sent.body, sent.status, sent.headers, cut_after=half if sent.status == 200 else 0)

    hub.fault = cut


def test_a_file_cut_in_half_is_not_taken_for_whole_and_the_next_call_goes_on(
    hub: LoopbackHub,  # noqa: F811
    adapters: AdapterSet,
    tmp_path: Path,
) -> None:
    push_to_hub(adapters, "user/repo")
    cut_in_half(hub, "layer_2/sae_weights.safetensors")
    with pytest.raises(CheckpointError, match=NETWORK) as caught:
        pull("user/repo", tmp_path / "pulled")
    assert is_one_clear_line(caught.value) and not (tmp_path / "pulled").exists()
    hub.fault = lambda request: None
    hub.server.requests.clear()
    assert pull("user/repo", tmp_path / "pulled").fingerprint == adapters.fingerprint
    assert "layer_0/sae_weights.safetensors" not in hub.downloads()  # they had arrived
    assert hub.downloads().count("layer_2/sae_weights.safetensors") == 1


def test_a_circuit_cut_in_half_is_not_taken_for_whole_and_the_next_call_goes_on(hub: LoopbackHub) -> None:  # noqa: F811
    circuit = replace(made(), features=made().features[1:])
    hub.files["user/repo"] = {}
    circuit.push_to_hub("user/repo")
    cut_in_half(hub, "circuits/hesitation.json")
    with pytest.raises(CheckpointError, match=NETWORK) as caught:
        Circuit.from_hub("user/repo")
    assert is_one_clear_line(caught.value)
    hub.fault = lambda request: None
    assert Circuit.from_hub("user/repo") == circuit
    hub.files["user/repo"]["circuits/hesitation.json"] = circuit.json_text().encode()[:300]
    hub.commits["main"] = "89ab" * 10  # a commit of half a file, which arrives whole
    with pytest.raises(UserError, match="circuits/hesitation.json"):
        Circuit.from_hub("user/repo")


def test_a_file_that_claims_to_be_shorter_is_refused(hub: LoopbackHub, adapters: AdapterSet, tmp_path: Path) -> None:  # noqa: F811
    push_to_hub(adapters, "user/repo")
    files = hub.files["user/repo"]
    files["layer_1/sae_weights.safetensors"] = files["layer_1/sae_weights.safetensors"][:300]
    with pytest.raises(UserError, match="missing or damaged"):
        pull("user/repo", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


CALLS = {"snapshot_download", "hf_hub_download", "get_safetensors_metadata", "dataset_builder", "load_table"}
CALLS |= {"load_dataset", "load_dataset_builder", "create_repo", "create_branch", "upload_folder", "upload_file"}
CALLS |= {"dataset_info", "model_info", "repo_info"}


def test_every_call_of_the_hub_is_within_hub_errors() -> None:
    package = Path(tl_adapters.__file__).parent
    bare = []
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text())
        guarded = [n for n in ast.walk(tree) if isinstance(n, ast.With) and "hub_errors(" in ast.unparse(n.items[0])]
        # Their callers are within hub_errors, which this test sees to.
        inner = ("dataset_builder", "load_table")
        guarded += [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in inner]
        inside = {id(inner) for node in guarded for inner in ast.walk(node)}
        for node in ast.walk(tree):
            called = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
            if called in CALLS and id(node) not in inside:
                bare.append(f"{path.relative_to(package)}, line {node.lineno}: {called}")
    assert not bare
