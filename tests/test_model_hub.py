"""Models of the Hugging Face hub, which is a server of this test's here."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_llama
from loading import CPU, edit_config, nothing, refusal

from passes.errors import UserError
from pipeline.__main__ import compose_config
from pipeline.config.schema import ModelConfig
from pipeline.model.load import load, load_reference
from pipeline.sweep.keys import Commits, content_key, pinned

# The Hugging Face hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A server with the hub's protocol and one repository, ``some/model``: the files of the folder given back.

    ``some/gated`` is gated, ``some/down`` breaks, and everything else does not exist.
    """
    from huggingface_hub import constants

    class Handler(http.server.BaseHTTPRequestHandler):
        def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            files = {file.name: file.read_bytes() for file in tiny_llama_dir.iterdir()}
            if "some/gated" in path:
                self.reply(403, X_Error_Code="GatedRepo")
            elif "some/down" in path:
                self.reply(500)
            elif "some/model" not in path:
                self.reply(401, X_Error_Code="RepoNotFound")
            elif path.endswith("/revision/other"):
                self.reply(404, X_Error_Code="RevisionNotFound")
            elif "/tree/" in path:
                entries = [{"type": "file", "path": n, "size": len(b), "oid": "1" * 40} for n, b in files.items()]
                self.reply(200, json.dumps(entries).encode())
            elif "/api/models/" in path:
                siblings = [{"rfilename": name} for name in files]
                info = {"id": "some/model", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
                self.reply(200, json.dumps(info).encode())
            else:
                body = files[path.rsplit("/", 1)[1]]
                self.reply(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    template = f"{constants.ENDPOINT}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tiny_llama_dir.parent / "hub"))
    yield tiny_llama_dir
    server.shutdown()
    server.server_close()


def from_hub(source: str, **changes: Any) -> ModelConfig:
    return ModelConfig(name="tiny", source=source, **{"revision": "main"} | changes)


def test_hub_model_is_pinned_to_its_commit_and_served_offline_afterwards(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    loaded = load(from_hub("some/model"), "fp32", CPU, 0, nothing)
    assert (loaded.source, loaded.revision) == ("some/model", COMMIT)
    assert loaded.sha256 == hashlib.sha256((hub / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    assert torch.equal(
        load(from_hub("some/model"), "fp32", CPU, 0, nothing).model.lm_head.weight, loaded.model.lm_head.weight
    )
    assert load_reference(from_hub("some/model"), "fp16", CPU, 0).dtype == torch.float32


def test_a_branch_that_moved_is_not_taken_for_the_same_weights(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    config = compose_config(["model=llama3_1b", "model.source=some/model", "model.revision=main"])
    commits, moved = Commits(), "f" * 40
    before = content_key(config, "", commits)
    assert pinned(config, commits).model.revision == COMMIT
    assert content_key(pinned(config, commits), "", Commits()) == before  # by its name or by its commit
    loaded = load(from_hub("some/model"), "fp32", CPU, 0, nothing)

    monkeypatch.setattr(f"{__name__}.COMMIT", moved)
    assert content_key(config, "", commits) == before  # within one sweep nothing moves
    assert content_key(config, "", Commits()) != before
    save_tiny_llama(hub, initializer_range=0.5)  # other weights
    after = load(from_hub("some/model"), "fp32", CPU, 0, nothing)
    assert after.revision == moved and not torch.equal(after.model.lm_head.weight, loaded.model.lm_head.weight)
    reference = load_reference(replace(from_hub("some/model"), revision=loaded.revision), "fp16", CPU, 0)
    assert torch.equal(reference.lm_head.weight, loaded.model.lm_head.weight)

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert pinned(config, Commits()).model.revision == moved  # what the cache holds


def test_what_is_not_on_the_hub_is_not_asked_for(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("pipeline.model.checkpoint.commit", refuse)
    for overrides in ([], ["model=llama3_1b", "model.weights=random"], ["model=local", f"model.path={tiny_llama_dir}"]):
        config = compose_config(overrides)
        assert pinned(config, Commits()) is config


def test_hub_model_of_another_kind_is_refused_before_its_weights_are_fetched(hub: Path) -> None:
    edit_config(hub, model_type="bert", architectures=["BertModel"])
    assert "BertModel is not a causal LM" in refusal(from_hub("some/model"))
    assert not list((hub.parent / "hub").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("source", "changes", "says"),
    [
        ("some/gated", {}, "model.source=some/gated: is gated"),
        ("some/thing-else", {}, "model.source=some/thing-else: does not exist or is private"),
        ("some/down", {}, "model.source=some/down: cannot be reached"),
        ("no good name", {}, "model.source=no good name: is not the name of a repository"),
        ("some/model", {"revision": "other"}, "model.revision=other: some/model has no such revision"),
    ],
)
def test_hub_refusals_name_the_setting_and_the_remedy(
    hub: Path, source: str, changes: dict[str, Any], says: str
) -> None:
    message = refusal(from_hub(source, **changes))
    assert message.startswith(says)
    if not changes:
        assert "model.weights=random" in message


def test_a_repository_by_its_name_has_the_lengths_and_the_architecture_of_its_config(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = compose_config(["model=some/model", "model.logits=all"])
    assert short == compose_config(["model=hub", "model.source=some/model", "model.logits=all"])
    assert (short.model.name, short.model.source, short.shape.max) == ("model", "some/model", 256)
    assert "shape.max=256" in short.notes[0]
    assert not list((hub.parent / "hub").rglob("*.safetensors"))
    loaded = load(short.model, "fp32", CPU, 0, nothing)
    assert (loaded.name, loaded.source, loaded.revision) == ("model", "some/model", COMMIT)
    random = compose_config(["model=some/model", "model.weights=random"])
    assert load(random.model, "fp32", CPU, 0, nothing).parameters == loaded.parameters

    monkeypatch.chdir(hub.parent)
    shutil.copytree(hub, hub.parent / "some" / "model")  # what is here comes before the hub
    here = compose_config(["model=some/model"]).model
    assert (here.path, here.source) == ("some/model", None)


def test_a_repository_that_cannot_be_had_is_one_line(hub: Path) -> None:
    for name, says in (
        ("some/gated", "is gated"),
        ("some/other", "does not exist"),
        ("some/down", "cannot be reached"),
    ):
        with pytest.raises(UserError) as caught:
            compose_config([f"model={name}"])
        assert str(caught.value).startswith(f"model.source={name}: {says}") and "\n" not in str(caught.value)
        assert "model=local model.path=DIR" in str(caught.value)


def test_hub_without_safetensors_is_refused(hub: Path) -> None:
    shutil.move(hub / "model.safetensors", hub / "pytorch_model.bin")
    assert "no safetensors weights" in refusal(from_hub("some/model"))


def test_unreachable_hub_is_refused_at_once(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    assert refusal(from_hub("some/model")).startswith("model.source=some/model: cannot be reached")
    assert time.monotonic() - start < 5
