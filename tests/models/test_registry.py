"""`--python-arch`: Hugging Face, registered names, entry points, and any module:function."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from psyche_fast.batch import Batch
from psyche_fast.models import load_model, register, registry
from psyche_fast.models.source import resolve_model

CODE = '''
import torch
from torch import nn
import torch.nn.functional as F

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, x, same):
        return x + torch.tanh(self.mix(same @ x))

class Averager(nn.Module):
    """Each token sees the mean over its own document so far."""

    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config["vocab"], config["width"])
        self.blocks = nn.ModuleList(Block(config["width"]) for _ in range(2))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, config["width"]), persistent=False)
        self.head = nn.Linear(config["width"], config["vocab"], bias=False)
        if config.get("tied"):
            self.head.weight = self.embed.weight
        self.leaks = config.get("leaks", False)
        self.kind = config.get("returns", "tuple")

    def forward(self, input_ids, labels=None, position_ids=None):
        batch, length = input_ids.shape
        if position_ids is None or self.leaks:
            position_ids = torch.arange(length).expand(batch, -1)
        start = F.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0)).cumsum(1)
        same = (start[:, :, None] == start[:, None, :]).tril().to(self.embed.weight.dtype)
        same = same / same.sum(-1, keepdim=True)
        x = self.embed(input_ids) * self.scale.to(self.embed.weight.dtype)
        for block in self.blocks:
            x = block(x, same)
        logits = self.head(x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits} if self.kind == "dict" else (loss, logits)

def build(config):
    return Averager(config)

def nonsense(config):
    return 3
'''
CONFIG = '{"vocab": 13, "width": 6'


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A user's module, and a folder with its weights."""
    (tmp_path / "their_model.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_model", raising=False)
    import their_model

    def save(extra: str = "") -> tuple[Path, torch.nn.Module]:
        folder = tmp_path / "weights"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(f"{CONFIG}{extra}}}")
        torch.manual_seed(1)
        module = their_model.build({"vocab": 13, "width": 6, "tied": "tied" in extra})
        state = module.state_dict()
        if "tied" in extra:
            del state["head.weight"]
        save_file(state, folder / "model.safetensors")
        return folder, module

    return save


def _load(folder: Path, architecture: str = "their_model:build", **kwargs):
    return load_model(
        resolve_model(str(folder)),
        architecture=architecture,
        device=torch.device("cpu"),
        param_dtype=kwargs.pop("param_dtype", torch.float32),
        **kwargs,
    )


@pytest.mark.parametrize("extra", ["", ', "tied": true', ', "returns": "dict"'])
def test_any_python_code_can_be_trained(own, extra: str) -> None:
    folder, reference = own(extra)
    model = _load(folder, activation_checkpointing=True)
    torch.testing.assert_close(model.module.scale, torch.linspace(0.5, 1.5, 6))
    ids = torch.randint(13, (3, 10), generator=torch.Generator().manual_seed(2))
    optimizers = [
        torch.optim.AdamW(module.parameters(), lr=1e-2) for module in (model.module, reference)
    ]
    for _ in range(3):
        expected = reference(ids, labels=ids)[0]
        model.train()
        loss = model.loss(Batch(ids))
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
        for value, optimizer in zip((loss, expected), optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert "head.weight" not in model.named_parameters() or "tied" not in extra
    saved = dict(model.full_state_dict_iter())
    assert saved.keys() == model.named_parameters().keys()
    for name, tensor in reference.named_parameters():
        torch.testing.assert_close(saved[name], tensor.detach())


def test_buffers_keep_their_precision_in_bf16(own) -> None:
    folder, _ = own()
    model = _load(folder, param_dtype=torch.bfloat16)
    assert {p.dtype for p in model.named_parameters().values()} == {torch.bfloat16}
    torch.testing.assert_close(model.module.scale, torch.linspace(0.5, 1.5, 6), rtol=0, atol=0)


def test_packed_documents_of_own_models(own) -> None:
    folder, _ = own()
    model = _load(folder)
    ids = torch.arange(1, 11)[None]
    packed, _ = model.forward(Batch(ids, sequence_lengths=[[4, 6]]))
    alone, _ = model.forward(Batch(ids[:, 4:]))
    torch.testing.assert_close(packed[:, 4:], alone)


def test_a_model_that_leaks_between_documents_is_refused(own) -> None:
    folder, _ = own(', "leaks": true')
    model = _load(folder)
    with pytest.raises(ValueError, match="Averager lets packed documents see one another"):
        model.loss(Batch(torch.arange(1, 11)[None], sequence_lengths=[[4, 6]]))
    assert model.loss(Batch(torch.arange(1, 11)[None])).isfinite()


def test_rows_without_labels_cost_nothing(own) -> None:
    folder, _ = own()
    model = _load(folder)
    ids = torch.ones(2, 5, dtype=torch.int64)
    loss = model.loss(Batch(ids, labels=torch.full_like(ids, -100)))
    loss.backward()
    assert loss.item() == 0.0
    assert all(not p.grad.any() for p in model.named_parameters().values() if p.grad is not None)
    assert any(p.grad is not None for p in model.named_parameters().values())


def test_registered_names(own) -> None:
    folder, _ = own()
    import their_model

    register("averager", their_model.build)
    try:
        assert "averager" in registry.known()
        assert _load(folder, "averager").loss(Batch(torch.ones(1, 4, dtype=torch.int64))) > 0
        with pytest.raises(ValueError, match="registered already"):
            register("averager", their_model.nonsense)
    finally:
        registry._BUILDERS.clear()
    for name in ("HfMine", "a:b"):
        with pytest.raises(ValueError, match="wanted no colon and no leading 'Hf'"):
            register(name, their_model.build)


def test_entry_points(own, tmp_path: Path) -> None:
    own()
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[psyche_fast.models]\ntheirs = their_model:build\n")
    import their_model

    assert registry.resolve("theirs") is their_model.build
    assert registry.known() == ["HfAuto", "theirs"]


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ("Torchtitan", "wanted one of HfAuto, or module:function; got 'Torchtitan'"),
        ("no_such_module:build", "cannot be imported .*PYTHONPATH"),
        ("their_model:missing", "cannot be imported"),
        ("their_model:CONST", "cannot be imported"),
        ("their_model:nonsense", "wanted an nn.Module, got int"),
        ("json:__name__", "is str, not a function"),
    ],
)
def test_unknown_architectures(own, architecture: str, says: str) -> None:
    folder, _ = own()
    with pytest.raises(ValueError, match=says):
        _load(folder, architecture)


@pytest.mark.parametrize("name", ["HfAuto", "HfLlama", "HfDeepseek"])
def test_psyches_hugging_face_names(name: str) -> None:
    assert registry.resolve(name) is None


def test_what_another_machine_names_is_imported_only_where_that_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PSYCHE_FAST_ARCHITECTURES", raising=False)
    for own in ("HfAuto", "HfLlama", "registered-by-somebody-here"):
        registry.check_named(own)
    for foreign in ("os:system", "mine:build", "subprocess:run", ":", "a.b:c.d"):
        with pytest.raises(ValueError, match="nobody has allowed on this machine: give --python-"):
            registry.check_named(foreign)
    monkeypatch.setenv("PSYCHE_FAST_ARCHITECTURES", "mine:build,other:build")
    registry.check_named("mine:build")
    with pytest.raises(ValueError, match="'mine:buil'"):
        registry.check_named("mine:buil")


@pytest.mark.parametrize("model_type", ["llama", "unheard_of"])
def test_a_model_folder_runs_no_code(
    model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And asks nobody whether it may, which Transformers does on a terminal."""
    from psyche_fast.data.tokenizer import load_tokenizer
    from psyche_fast.models.source import check_model
    from tests.tiny import save_llama

    folder = save_llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    auto = {n: f"evil.{n}" for n in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    config |= {"model_type": model_type, "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": [None, "evil.AutoTokenizer"]}})
    )
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass AutoConfig: pass\n"
    for name in ("evil.py", "modeling_llama.py", "tokenizer.py"):
        (folder / name).write_text(code)
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    if model_type == "llama":
        load_model(resolve_model(str(folder)), device=torch.device("cpu"))
    else:
        with pytest.raises(ValueError, match="does not know model_type 'unheard_of'"):
            check_model(resolve_model(str(folder)))
    with pytest.raises(ValueError, match="cannot load a tokenizer from"):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()
    assert asked == []
