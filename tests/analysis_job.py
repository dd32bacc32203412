"""Analyses of small runs in a rank of a ``RankPool``, with what is planted in them; for tests."""

from __future__ import annotations

from pathlib import Path

SIZES = {"num_tokens": 512, "adapt_batches": 2, "drift_steps": 3}


def analysed(paths: list[str], out: str, corpus: str, domain: str | None, parts: list[str] | None):
    """Write the page here; return the content of analysis.json and what was said."""
    from vqmoe_megatron.analysis import analyze
    from vqmoe_megatron.analysis.settings import Settings
    from vqmoe_megatron.config import RunConfig
    from vqmoe_megatron.plan.layout import ParallelLayout

    settings, said = Settings(**SIZES), []
    request = analyze.check_request(
        [Path(path) for path in paths],
        Path(out),
        settings,
        parts,
        Path(corpus),
        None if domain is None else Path(domain),
    )
    layout = ParallelLayout.from_config(RunConfig(), 1)
    done = analyze.analyze_here(request, settings, layout, said.append)
    return done.content, said


def loaded(path: str, corpus: str, num_tokens: int):
    """A model and its text, in this rank."""
    from vqmoe_megatron.analysis.loaded_model import load_model
    from vqmoe_megatron.analysis.part import Subject
    from vqmoe_megatron.analysis.settings import Settings
    from vqmoe_megatron.analysis.text import Text
    from vqmoe_megatron.checkpoint.folder import find_checkpoint
    from vqmoe_megatron.config import RunConfig
    from vqmoe_megatron.data.corpus import load_corpus
    from vqmoe_megatron.plan.layout import ParallelLayout

    layout = ParallelLayout.from_config(RunConfig(), 1)
    model = load_model("model", find_checkpoint(Path(path)), layout)
    text = Text(load_corpus(corpus), "valid", model.config.model.seq_length, num_tokens)
    return Subject(model, Settings(**SIZES), text, text, text, text)


def loss_of(path: str, corpus: str, num_tokens: int) -> float:
    """Nats per token of the checkpoint's validation text."""
    return loaded(path, corpus, num_tokens).seen.loss


def read_twice(path: str, corpus: str) -> tuple[str, float, float]:
    """What the model is, and nats per token of the same windows, read once and again."""
    from vqmoe_megatron.analysis.observation import observe

    subject = loaded(path, corpus, 512)
    first, second = (observe(subject.model, subject.text.batches()).loss for _ in range(2))
    return subject.model.kind, first, second


def moved_by_a_codebooks_step(path: str, corpus: str) -> list[str]:
    """Names of what one batch that only codebooks follow moves."""
    import torch

    from vqmoe_megatron.analysis.training import move_codebooks

    subject = loaded(path, corpus, 512)
    start = subject.model.at_start()
    move_codebooks(subject.model, next(subject.text.batches()))
    now = subject.model.at_start()
    return [n for n, t in now.items() if torch.is_tensor(t) and not torch.equal(t, start[n])]


def planted(path: str, corpus: str) -> dict:
    """What parts find before and after experts and codebooks were tampered with."""
    import torch

    from vqmoe_megatron.analysis.observation import code_assigners, observe
    from vqmoe_megatron.analysis.part import Subject
    from vqmoe_megatron.analysis.parts import adaptation, collapse, drift, routing

    subject = loaded(path, corpus, 512)
    model, start = subject.model, subject.model.at_start()
    before = observe(model, subject.text.batches())
    found = {"collapse": collapse.measure(subject)["rows"], "kind": model.kind}

    def again() -> Subject:
        return Subject(model, subject.settings, subject.text, earlier={1: before})

    for layer in model.layers:  # every expert a copy of the first
        for parameter in layer.experts.parameters():
            parameter.data.copy_(parameter.data[:1].expand_as(parameter))
    found["copies"] = collapse.measure(again())["rows"]
    model.go_back(start)
    for layer in model.layers:  # codes change their places
        for path_of_layer in layer.paths:
            for assigner in code_assigners(path_of_layer).values():
                codes = assigner.codebook.codes.data
                codes.copy_(codes.roll(1, dims=1))
    found["permuted"] = routing.measure(again())["rows"]
    model.go_back(start)
    if model.config.vq.path == "dual":
        domain = loaded(path, corpus, 512)
        found["adaptation"] = adaptation.measure(domain)
        found["drift"] = drift.measure(domain)
        after = domain.model.at_start()
        found["is_back"] = all(
            torch.equal(value, start[name])
            for name, value in after.items()
            if torch.is_tensor(value)
        )
    return found


def adapted(path: str, corpus: str, num_batches: int) -> dict:
    """What is trained on where a pass reads fewer windows than training takes."""
    from dataclasses import replace

    from vqmoe_megatron.analysis.parts import adaptation

    subject = loaded(path, corpus, 128)
    settings = replace(subject.settings, adapt_batches=num_batches)
    return adaptation.measure(replace(subject, settings=settings))
