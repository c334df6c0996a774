"""`adapters add` where engines are behind a name, on other machines, or not there: over real sockets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.edge import free_port

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.config import source_directory
from aiexport_edge.proto.engine_pb2_grpc import EngineServicer, add_EngineServicer_to_server
from aiexport_edge.shim.adapter_copies import AdapterCopies, CopyError
from aiexport_edge.shim.cli import adapters_add
from aiexport_edge.shim.cli.main import main
from aiexport_edge.shim.engines.access import Endpoint


class Refusing(EngineServicer):
    """An engine that refuses what it is told to."""

    def __init__(self) -> None:
        self.refusal = ""
        self.loaded: list[pb.LoadAdapterRequest] = []
        self.unloaded: list[str] = []
        self.owners: set[int] = set()  # of the files that it was asked to load

    def LoadAdapter(self, request: pb.LoadAdapterRequest, context: grpc.ServicerContext) -> pb.Adapter:
        self.loaded.append(request)
        self.owners = {path.stat().st_uid for path in (Path(request.path), *Path(request.path).iterdir())}
        if self.refusal:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, self.refusal)
        return pb.Adapter(name=request.name)

    def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, context: grpc.ServicerContext
    ) -> pb.UnloadAdapterResponse:
        self.unloaded.append(request.name)
        return pb.UnloadAdapterResponse()

    def ListAdapters(self, request: pb.ListAdaptersRequest, context: grpc.ServicerContext) -> pb.ListAdaptersResponse:
        return pb.ListAdaptersResponse()


@pytest.fixture
def engine() -> Iterator[tuple[Refusing, int]]:
    servicer, port = Refusing(), free_port()
    server = grpc.server(ThreadPoolExecutor(2))
    add_EngineServicer_to_server(servicer, server)
    assert server.add_insecure_port(f"127.0.0.1:{port}") == port
    server.start()
    yield servicer, port
    server.stop(None).wait()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """For the demo model: of one product."""
    config = json.loads((source_directory("demo") / "config.json").read_text())["text_config"]
    rows, hidden = config["num_attention_heads"] * config["head_dim"], config["hidden_size"]
    directory = tmp_path / "adapter"
    directory.mkdir()
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    factors = {"A": np.zeros((2, hidden), np.float32), "B": np.zeros((rows, 2), np.float32)}
    save_file(
        {f"{name}.lora_{key}.weight": value for key, value in factors.items()}, directory / "adapter_model.safetensors"
    )
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    return directory


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*args: str, engines: str = '["127.0.0.1:9"]', more: str = "") -> tuple[int, str, str]:
        file = tmp_path / "aiexport-edge.toml"
        file.write_text(f"[shim]\nengines = {engines}\n{more}")
        code = main([*args, "--config", str(file), "--state", str(tmp_path / "state")])
        said = capsys.readouterr()
        return code, said.out, said.err

    assert run("workspaces", "create", "acme", "--plan", "enterprise")[0] == 0
    return run


def given(adapter: Path) -> tuple[str, ...]:
    return "adapters", "add", "--workspace", "acme", "--base", "apex-sonnet-4", "--id", "own", str(adapter)


def test_engines_behind_a_name_are_asked(run: Any, engine: tuple[Refusing, int], adapter: Path, tmp_path: Path) -> None:
    servicer, port = engine
    names = f'["dns:///localhost:{port}", "dns:///no-such-name.invalid:1"]'
    servicer.refusal = "This engine has set nothing of its card aside for adapters."
    code, _, said = run(*given(adapter), engines=names)
    assert code == 1
    assert "nothing of its card aside" in said
    assert list((tmp_path / "state" / "adapters").iterdir()) == []  # its copy is gone again
    servicer.refusal = ""
    code, out, said = run(*given(adapter), engines=names)
    assert code == 0, said
    assert "ft-acme-own" in out
    assert "dns:///no-such-name.invalid:1 has no address just now" in said
    assert [request.name for request in servicer.loaded[1:]] == servicer.unloaded
    copy = Path(servicer.loaded[-1].path)
    assert copy.parent == tmp_path / "state" / "adapters"
    assert (copy / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()
    assert run("adapters", "remove", "ft-acme-own", engines=names)[0] == 0
    assert copy.is_dir()  # an engine is there: its shim removes the copy, when nobody runs with it


def test_without_an_engine(run: Any, adapter: Path, tmp_path: Path) -> None:
    nobody = f'["127.0.0.1:{free_port()}"]'
    code, _, said = run(*given(adapter), engines=nobody)
    assert code == 0, said
    assert "no engine answers just now" in said
    (copy,) = (tmp_path / "state" / "adapters").iterdir()
    assert run("adapters", "remove", "ft-acme-own", engines=nobody)[0] == 0
    assert not copy.exists()
    in_place = f'[adapters]\nroots = ["{adapter.parent}"]\n'
    code, out, _ = run(*given(adapter), engines=nobody, more=in_place)
    assert code == 0
    assert str(adapter) in out
    assert list(copy.parent.iterdir()) == []
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": true}')
    code, _, said = run("adapters", "add", *given(adapter)[2:-2], "other", str(adapter), engines=nobody, more=in_place)
    assert code == 1
    assert "use_dora True is not served" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what belongs to others")
def test_the_engine_of_another_user_can_read_what_root_adds(
    run: Any, engine: tuple[Refusing, int], adapter: Path, tmp_path: Path
) -> None:
    servicer, port = engine
    os.chown(tmp_path / "state", 12345, 12345)
    code, _, said = run(*given(adapter), engines=f'["127.0.0.1:{port}"]')
    assert (code, said) == (0, "")
    assert servicer.owners == {12345}


def test_what_is_said_of_an_engine_elsewhere(tmp_path: Path) -> None:
    from aiexport_edge.proto import config as configuration

    config = configuration.load(None, tmp_path)
    elsewhere = Endpoint("10.0.0.7:50051", "engines.internal")
    said = adapters_add.refused(config, elsewhere, str(tmp_path / "adapters" / "abc"), "There is no directory")
    assert "the engine 10.0.0.7:50051: There is no directory. Engines on other machines do not see" in said
    assert adapters_add.refused(config, elsewhere, "/srv/own", "Why") == "the engine 10.0.0.7:50051: Why"
    assert adapters_add.refused(config, Endpoint("127.0.0.1:50051"), "/srv/own", "Why") == "Why"


def test_a_copy_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "adapter_config.json").write_text("{}")
    (source / "adapter_model.safetensors").mkdir()
    copies = AdapterCopies(tmp_path / "copies")
    with copies.locked(wait=True) as is_ours:
        assert is_ours
        with pytest.raises(CopyError, match="could not be copied"):
            copies.take(source, lambda _count, _where: None)
        with copies.locked(wait=False) as is_also_ours:
            assert not is_also_ours
    assert list(copies.root.iterdir()) == []
    assert AdapterCopies(tmp_path / "none").besides(set()) == []
