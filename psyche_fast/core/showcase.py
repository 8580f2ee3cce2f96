"""The main job on an embedded default: a small Llama learns Python from its standard library.

Nothing is downloaded: the text is on every machine that runs Python, the tokenizer is trained on
the spot, the model is a fresh one.
"""

from __future__ import annotations

import sys
import sysconfig
from datetime import datetime
from pathlib import Path

import torch
import transformers

from psyche_fast.config import RunConfig
from psyche_fast.core.generate import continued
from psyche_fast.core.plan import make_plan
from psyche_fast.core.run import run
from psyche_fast.data import find_files, iter_texts, tokenize_files, train_tokenizer
from psyche_fast.metrics import read_metrics
from psyche_fast.metrics.console import print_card
from psyche_fast.metrics.formatting import format_bytes
from psyche_fast.metrics.report import write as write_page
from psyche_fast.start.early import Early

STEPS = 1500
SEQUENCE_LENGTH = 128
VOCABULARY = 1024
PROMPTS = ("def ", "class ", "import ")
_HELD_OUT = 40
"""One module in so many is not trained on."""
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib"}


def standard_library() -> list[Path]:
    """The running Python's own modules, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = find_files([root], ["*.py"])
    return [f for f in files if not _LEFT_OUT & set(f.relative_to(root).parts)]


def make_model(folder: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    """Writes a freshly initialised Llama of just under a million parameters and its tokenizer."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=SEQUENCE_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_demo(
    *,
    max_steps: int | None,
    output: Path | None,
    replicas: int,
    data_parallelism: int,
    device: str,
    early: Early | None = None,
) -> None:
    """Tokenises, trains, samples and plots; prints what it did.

    Args:
        max_steps: steps to train; None for the default.
        output: run directory.
        replicas: DisTrO peers.
        data_parallelism: ranks that share a replica's model.
        device: as of `train`; `auto` uses the CPU where there are fewer GPUs than ranks.
        early: sidecars that have been started already.

    Raises:
        ValueError: the output folder is in use.
    """
    transformers.utils.logging.disable_progress_bar()
    output = output or Path(datetime.now().strftime("runs/demo-%Y%m%d-%H%M%S"))
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"--output {output} is not empty; name another folder")
    ranks = replicas * data_parallelism
    if device == "auto" and 0 < torch.cuda.device_count() < ranks:
        _say(f"{torch.cuda.device_count()} GPU for {ranks} ranks: running on the CPU")
        device = "cpu"
    _say("reading Python's standard library and training a tokenizer on it ...")
    files = standard_library()
    held_out = files[_HELD_OUT // 2 :: _HELD_OUT]
    files = [file for file in files if file not in held_out]
    tokenizer = train_tokenizer(iter_texts(files, errors="skip"), VOCABULARY)
    for some, folder in ((held_out, "held-out"), (files, "data")):
        summary = tokenize_files(
            some, tokenizer, output / folder, errors="skip", progress=sys.stderr.isatty()
        )
    _say(f"{summary.documents} modules, {summary.tokens:,} tokens, {len(held_out)} more held out")
    make_model(output / "model", tokenizer)
    steps = max_steps or STEPS
    plan = make_plan(
        RunConfig.of(
            model=str(output / "model"),
            data_path=str(output / "data"),
            sequence_length=SEQUENCE_LENGTH,
            micro_batch=-(-8 // data_parallelism),  # on each rank of the 8 rows of a replica
            total_batch=8 * replicas,
            learning_rate=1e-3,
            warmup_steps=min(20, steps // 4),
            total_steps=steps,
            weight_decay=0.0,
            distro=True,
            distro_quantization=True,
            compression_chunk=16,
            compression_topk=4,
            compression_decay=0.95,
            replicas=replicas,
            data_parallelism=data_parallelism,
            param_dtype="float32",
            device=device,
            seed=1,
            eval_data=str(output / "held-out"),
            eval_every=-(-steps // 6),
            eval_sequences=64,
            samples_every=-(-steps // 3),
            sample_prompt=PROMPTS,
            sample_tokens=24,
            output=str(output),
        )
    )
    print_card(plan.summary)
    result = run(plan, early=early)
    if result.signal is not None or result.checkpoint is None:
        sys.exit(128 + (result.signal or 1))
    _report(result.output, result.checkpoint)


def _report(output: Path, checkpoint: Path) -> None:
    metrics = read_metrics(output / "metrics.jsonl")
    # One small batch says little: the mean of the last steps is what has been learnt.
    first, last = metrics[0], metrics[-20:]
    mean = sum(m["loss"] for m in last) / len(last)
    print(
        f"\nloss        {first['loss']:.2f} at step {first['step']}, {mean:.2f} over the last "
        f"{len(last)} of {last[-1]['step']} steps"
    )
    if (bits := metrics[-1].get("eval_bits_per_byte")) is not None:
        print(f"held out    {bits:.3f} bits per byte of modules that were not trained on")
    sent = sum(m["bytes_sent"] for m in metrics)
    dense = sum(m["dense_bytes"] for m in metrics)
    if sent:
        print(
            f"sent        {format_bytes(sent)} per replica instead of {format_bytes(dense)} of "
            f"gradients: {dense / sent:.0f} times less"
        )
    print(f"checkpoint  {checkpoint} (AutoModelForCausalLM.from_pretrained loads it)")
    print(f"plots       {output / 'plots'}")
    print(
        f"page        {write_page([output]).resolve()} (open it in a browser; it needs no network)"
    )
    for prompt, text in zip(PROMPTS, continued(str(checkpoint), PROMPTS, tokens=60), strict=True):
        print(f"\n--- the model continues {prompt!r} ---\n{text}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
