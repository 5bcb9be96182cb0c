"""Evidence of an audit against plain loops in double precision, and against the model itself."""

import csv
import json
import math
from threading import Thread

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from hashattn import Budget, HashSelector, HashWeights, attach
from hashattn.attention.observer import LayerStep
from hashattn.selectors.base import KeyView
from hashattn.selectors.dense import DenseSelector
from hashattn.selectors.oracle import OracleSelector
from hashattn.selectors.random import RandomSelector
from hashattn.trust.audit.evidence import COLUMNS, LAYER, Evidence, LayerEvidence
from hashattn.trust.audit.figure import draw_missed
from hashattn.trust.audit.frames import frame_bytes, read_frames
from hashattn.trust.audit.listener import Audit, AuditSettings
from hashattn.trust.audit.source import AuditError, Document
from hashattn.trust.exact import row_weights
from helpers import characters, generate, prompt, tiny_model

SMALL = Budget(sink=1, local=3, heavy=6)
TEXT = "Alice sees Bob.\nBob sees no one.\nWho sees Bob?"
NEAR = dict(rel=1e-3, abs=1e-6)  # evidence is kept in half precision


class Copies:
    """A listener that keeps what a float64 loop needs."""

    timed = False

    def __init__(self):
        self.steps = {}

    def saw(self, step):
        if step.reason in ("prefill", "no_cache", "sliding_window"):
            return
        rows, n = step.query.shape[2], step.n
        for row in range(rows):
            if step.indices is None:
                seen = list(range(n - rows + row + 1))
                lists, added = [seen], None
            else:
                seen = step.plan.seen[0, 0, row].nonzero()[:, 0].tolist()
                lists = [[i for i in one if i >= 0] for one in step.indices[0, :, row].tolist()]
                added = None if step.log_weights is None else step.log_weights[0, :, row].tolist()
            self.steps[n - rows + row, step.layer] = dict(
                query=step.query[0, :, row].double().tolist(),
                keys=step.view.keys[0].double().tolist(),
                seen=seen, lists=lists, added=added, n=n, **step.logits,
            )  # fmt: skip


def weights_of(copy):
    """(read, dense, missed), each heads x n, by loops."""
    heads, kv = len(copy["query"]), len(copy["keys"])
    result = []
    for head, query in enumerate(copy["query"]):
        keys = copy["keys"][head // (heads // kv)]
        number = head // (heads // len(copy["lists"]))
        listed = copy["lists"][number]
        logits = [copy["scaling"] * sum(a * b for a, b in zip(query, key, strict=True))
                  for key in keys]  # fmt: skip
        if copy["softcap"]:
            logits = [copy["softcap"] * math.tanh(x / copy["softcap"]) for x in logits]
        sink = 0.0 if copy["sinks"] is None else math.exp(float(copy["sinks"][head]))

        def softmax(tokens, added, logits=logits, sink=sink, n=copy["n"]):
            raised = {t: math.exp(logits[t] + a) for t, a in zip(tokens, added, strict=True)}
            total = sum(raised.values()) + sink
            return [raised.get(t, 0.0) / total for t in range(n)]

        added = [0.0] * len(listed) if copy["added"] is None else copy["added"][number]
        read = softmax(listed, added[: len(listed)])
        dense = softmax(copy["seen"], [0.0] * len(copy["seen"]))
        missed = [0.0 if t in listed else dense[t] for t in range(copy["n"])]
        result.append((read, dense, missed))
    return list(zip(*result, strict=True))


def audited(
    model, selector, budget=SMALL, *, text=TEXT, new=5, attached=None, tokenizer=None, **kept
):
    """(audit, copies, ids) of one generation."""
    tokenizer = tokenizer or characters()
    audit = Audit(tokenizer, text, **kept)
    ids = tokenizer(text, return_tensors="pt").input_ids
    with attach(model, selector, budget, allow_dense=True, **(attached or {})) as run:
        with run.listen(audit), run.listen(Copies()) as copies:
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                streamer=audit,
            )  # fmt: skip
    return audit, copies, out


def check(evidence, copies):
    """Every number of the evidence against the loops."""
    prompt_tokens = len(evidence.source.ids)
    for token in evidence.tokens:
        for layer in evidence.layers:
            found = evidence.layer(token, layer)
            copy = copies.steps[prompt_tokens - 1 + token, layer]
            kinds = weights_of(copy)
            assert found.n == copy["n"]
            assert [list(np.flatnonzero(one)) for one in found.listed] == copy["lists"]
            group = found.heads // len(copy["lists"])
            counts = [len(copy["lists"][head // group]) for head in range(found.heads)]
            assert found.read_tokens.tolist() == counts
            segments = evidence.source.segments(found.n)
            for head in range(found.heads):
                assert found.missed[head] == pytest.approx(sum(kinds[2][head]), rel=1e-4, abs=1e-6)
                for kind in range(3):
                    exact = kinds[kind][head]
                    sums = [0.0] * (len(evidence.source.passages) + 2)
                    for position, weight in enumerate(exact):
                        sums[segments[position]] += weight
                    assert found.masses[kind, head].tolist() == pytest.approx(sums, **NEAR)
                    top = [t for t in found.top[kind, head].tolist() if t >= 0]
                    best = sorted(exact, reverse=True)[: len(found.top[kind, head])]
                    assert [exact[t] for t in top] == pytest.approx(
                        [w for w in best if w > 0], rel=1e-4
                    )
                    stored = found.top_read[kind, head].tolist()
                    assert stored[: len(top)] == pytest.approx(
                        [kinds[0][head][t] for t in top], **NEAR
                    )
                    stored = found.top_dense[kind, head].tolist()
                    assert stored[: len(top)] == pytest.approx(
                        [kinds[1][head][t] for t in top], **NEAR
                    )


@pytest.mark.parametrize("family", ["llama", "llama_mqa", "gemma2", "qwen2_sliding", "gpt_neox"])
@pytest.mark.parametrize("layout", ["per_query_head", "per_kv_head"])
def test_evidence_is_what_a_loop_finds(family, layout):
    audit, copies, _ = audited(tiny_model(family), OracleSelector(layout))
    evidence = audit.evidence
    assert evidence.tokens == [1, 2, 3, 4] and len(copies.steps) == 4 * len(evidence.layers)
    check(evidence, copies)
    sliding = {"gemma2": [0], "qwen2_sliding": [1]}.get(family, [])
    assert sorted(evidence.unaudited) == sliding == sorted({0, 1} - set(evidence.layers))
    lists = len(evidence.layer(1, evidence.layers[0]).listed)
    config = tiny_model(family).config
    kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    assert lists == (config.num_attention_heads if layout == "per_query_head" else kv)


@pytest.mark.parametrize("layout", ["per_query_head", "per_kv_head"])
def test_evidence_of_the_embedded_model_and_its_hashes(layout):
    model = AutoModelForCausalLM.from_pretrained("data/embedded").eval()
    weights = HashWeights.load("data/embedded/hash_weights", model)
    text = "Note: Alice visits Kyoto\n" + 4 * "Nothing happens here.\n" + "Q: Alice visits"
    audit, copies, _ = audited(
        model, HashSelector(weights, layout=layout), SMALL, text=text, new=3,
        tokenizer=AutoTokenizer.from_pretrained("data/embedded"),
    )  # fmt: skip
    evidence = audit.evidence
    assert evidence.tokens == [1, 2] and evidence.layers == [0, 1, 2, 3]
    assert len(evidence.layer(1, 0).listed) == (8 if layout == "per_query_head" else 2)
    check(evidence, copies)


def test_drawn_tokens_count_by_their_weights():
    budget = Budget(sink=1, local=2, heavy=9, sampled=0.7)
    audit, copies, _ = audited(tiny_model("llama"), OracleSelector(), budget)
    assert any(step["added"] and any(map(any, step["added"])) for step in copies.steps.values())
    check(audit.evidence, copies)


def test_dense_layers_read_everything_and_miss_nothing():
    audit, copies, _ = audited(
        tiny_model("llama"), OracleSelector(), attached={"dense_layers": [1]}
    )
    evidence = audit.evidence
    check(evidence, copies)
    sparse, dense = (evidence.layer(2, layer) for layer in (0, 1))
    assert (sparse.reason, dense.reason) == (None, "dense_layer")
    assert dense.listed.all() and not dense.missed.any() and sparse.missed.any()
    assert (dense.top[2] == -1).all()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_dense_weights_are_the_model_s_own(family):
    model = tiny_model(family, attention="eager")
    audit, _, ids = audited(model, DenseSelector(), None, new=3)
    evidence = audit.evidence
    with torch.no_grad():
        own = model(ids[:, :-1], output_attentions=True).attentions
    for layer in evidence.layers:
        found = evidence.layer(2, layer)
        exact = own[layer][0, :, -1]  # the row that answers the last token
        segments = torch.from_numpy(evidence.source.segments(found.n))
        sums = torch.zeros(*exact.shape[:1], found.masses.shape[2]).index_add_(1, segments, exact)
        for kind in (0, 1):
            assert found.masses[kind] == pytest.approx(sums.numpy(), **NEAR)


def test_the_rows_that_answer_are_audited_and_no_others():
    """Several rows a call: the prompt's last row and drafted tokens; rows of the question not."""
    model, tokenizer = tiny_model("llama"), characters()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    audit = Audit(tokenizer, TEXT)
    with torch.no_grad(), attach(model, OracleSelector(), SMALL, sparse_rows=6) as run:
        cache = model(ids[:, :-6]).past_key_values
        with run.listen(audit), run.listen(Copies()) as copies:
            model(ids[:, -6:-3], past_key_values=cache)
            assert audit.evidence.tokens == []
            more = torch.cat((ids[:, -3:], prompt(1, 2)), dim=1)
            model(more, past_key_values=cache)
            model(prompt(1, 1), past_key_values=cache)
    assert audit.evidence.tokens == [0, 1, 2, 3]
    check(audit.evidence, copies)


def test_drafts_that_were_right_are_put_several_at_a_time():
    tokenizer = characters()
    audit = Audit(tokenizer, TEXT)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with pytest.raises(AuditError, match="does not begin with"):
        audit.put(prompt(1, 3))  # no sequence with the prompt came before
    audit.put(ids)
    audit.put(torch.tensor([[5, 6, 7]]))
    audit.put(torch.tensor([8]))
    assert [token for token, _ in audit.evidence.answer.values()] == [5, 6, 7, 8]


def test_another_thread_s_answer_is_not_this_one_s():
    model, tokenizer = tiny_model("llama"), characters()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    audit = Audit(tokenizer, TEXT)
    with attach(model, OracleSelector(), SMALL) as run, run.listen(audit):
        generate(model, ids, streamer=audit)
        alone = audit.evidence
        other = Thread(target=generate, args=(model, prompt(1, 60)))
        other.start()
        other.join()
    assert audit.evidence.tokens == alone.tokens and alone.tokens
    for token in alone.tokens:
        np.testing.assert_array_equal(
            audit.evidence.layer(token, 0).masses, alone.layer(token, 0).masses
        )


def test_a_token_at_which_the_ceiling_was_reached_is_left_out():
    first, _, _ = audited(tiny_model("llama"), OracleSelector(), new=3)
    size = len(b"hashattn audit 1\n")
    for frame in read_frames(first._log.content(), "x"):
        size += len(frame_bytes(frame))
        if frame.kind == LAYER:
            break
    one_layer = AuditSettings(ceiling=size)
    audit, _, _ = audited(tiny_model("llama"), OracleSelector(), new=3, settings=one_layer)
    assert audit.evidence.full and audit.evidence.tokens == []
    axis = Figure().subplots()
    nothing = Audit(characters(), TEXT).evidence
    with pytest.raises(AuditError, match="nothing to draw"):
        draw_missed(axis, nothing)


def test_every_third_token():
    audit, copies, _ = audited(
        tiny_model("llama"), RandomSelector(), new=9, settings=AuditSettings(every=3, top=2)
    )
    assert audit.evidence.tokens == [1, 4, 7]
    assert sorted(audit.evidence.answer) == list(range(9))
    check(audit.evidence, copies)


def test_a_prompt_of_one_token():
    audit, copies, _ = audited(tiny_model("llama"), OracleSelector(), text="a", new=9)
    evidence = audit.evidence
    assert evidence.tokens == list(range(1, 9)) and len(evidence.source.passages) == 1
    check(evidence, copies)


def _step(heads, kv, n, lists, m, sinks=None, softcap=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, heads, 1, 8, generator=generator)
    keys = torch.randn(1, kv, n, 8, generator=generator)
    indices = torch.stack([torch.randperm(n, generator=generator)[:m].sort().values
                           for _ in range(lists)])[None, :, None].int()  # fmt: skip
    padding = torch.full((1, lists, 1, 2), -1, dtype=torch.int32)
    indices = torch.cat((indices, padding), dim=-1)

    class Plan:
        seen = torch.ones(1, 1, 1, n, dtype=torch.bool)

    Plan.seen[..., 0] = False  # padding on the left
    indices[indices == 0] = -1
    logits = {"scaling": 0.7, "softcap": softcap, "sinks": sinks}
    return LayerStep(0, query, n, n, None, indices, None, Plan(), KeyView(keys), None, logits)


@pytest.mark.parametrize("lists", [2, 4])
def test_sinks_caps_and_padding(lists):
    step = _step(4, 2, 11, lists, 5, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]), softcap=1.5)
    copies = Copies()
    step_weights = row_weights(step)
    copies.saw(step)
    read, dense, missed = (torch.tensor(x) for x in weights_of(copies.steps[10, 0]))
    assert (dense.sum(-1) < 0.99).all() and not dense[:, 0].any()
    for found, exact in ((step_weights.read, read), (step_weights.dense, dense),
                         (step_weights.missed, missed)):  # fmt: skip
        torch.testing.assert_close(found.double(), exact.double(), rtol=1e-4, atol=1e-7)


def test_a_row_that_reads_nothing_gives_no_weight():
    step = _step(2, 2, 3, 2, 1)
    step.indices.fill_(-1)
    weights = row_weights(step)
    assert not weights.read.any() and torch.allclose(weights.missed.sum(-1), torch.ones(2))


def test_rows_in_json_and_csv_are_the_evidence(tmp_path):
    documents = [Document("=cmd()\n\ud800.txt", 16, 32, 100)]
    audit, copies, _ = audited(
        tiny_model("llama"), OracleSelector("per_kv_head"), documents=documents
    )
    evidence = audit.evidence
    stored = json.loads(evidence.save_json(tmp_path / "e.json").read_text())
    assert stored["columns"] == list(COLUMNS) and stored["rows"] == list(evidence.rows())
    with open(evidence.save_csv(tmp_path / "e.csv"), encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(stored["rows"])
    for row, line in zip(stored["rows"], written, strict=True):
        exact = weights_of(copies.steps[len(TEXT) - 1 + row["token"], row["layer"]])
        exact = [kind[row["head"]] for kind in exact]
        if row["unit"] == "token":
            places = [row["position"]]
        elif row["unit"] == "answer":
            places = range(len(TEXT), len(exact[0]))
        else:
            places = range(row["prompt_start"], row["prompt_end"])  # a token is one character
        sums = [sum(kind[p] for p in places) for kind in exact]
        assert [row[kind] for kind in ("read", "dense", "missed")] == pytest.approx(sums, **NEAR)
        inside = row["prompt_start"] is not None and 16 <= row["prompt_start"] < 32
        if inside:
            assert row["source"] == documents[0].name and row["start"] == row["prompt_start"] + 84
            assert line["source"] == "'=cmd()\\n\\ud800.txt"
        elif row["prompt_start"] is not None:
            assert (row["source"], row["start"]) == ("prompt", row["prompt_start"])
        for name, value in row.items():
            if name not in ("source", "token_text"):
                assert line[name] == ("" if value is None else str(value))
    units = {row["unit"] for row in stored["rows"]}
    assert units == {"passage", "token", "answer"}
    few = list(evidence.rows(tokens=[2], layers=[1], heads=[3]))
    assert {(r["token"], r["layer"], r["head"]) for r in few} == {(2, 1, 3)}
    # one passage, unlike a token, has all of its weight: passages and answer sum to 1
    sums = sum(r["dense"] for r in few if r["unit"] in ("passage", "answer"))
    assert sums == pytest.approx(1, rel=2e-3)


def test_memory_is_bounded_as_the_settings_say():
    settings = AuditSettings()
    by_query = 200 * 32 * settings.step_bytes(8192, heads=32, lists=32)
    by_group = 200 * 32 * settings.step_bytes(8192, heads=32, lists=8)
    assert (round(by_query / 1e6), round(by_group / 1e6)) == (410, 252)
    audit, _, _ = audited(tiny_model("llama"), OracleSelector("per_kv_head"), new=40)
    evidence, kept = audit.evidence, 0
    for token in evidence.tokens:
        found = evidence.layer(token, 0)
        bound = settings.step_bytes(found.n, 4, 2, segments=found.masses.shape[2])
        arrays = (found.missed, found.masses, found.top, found.top_read, found.top_dense)
        kept = sum(a.nbytes for a in arrays) + np.packbits(found.listed, axis=-1).nbytes
        assert kept <= bound and len(found.to_frame().content) < bound + 200
        assert kept >= 0.9 * bound


def test_the_ceiling_stops_the_audit_and_not_the_run(tmp_path):
    file = tmp_path / "small.audit"
    whole, _, ids = audited(tiny_model("llama"), OracleSelector(), new=30)
    ceiling = whole._log.size // 2
    settings = AuditSettings(ceiling=ceiling)
    audit, copies, other = audited(
        tiny_model("llama"), OracleSelector(), new=30, settings=settings, file=file
    )
    evidence = Evidence.load(file)
    assert torch.equal(ids, other) and evidence.full and not whole.evidence.full
    assert 5 < len(evidence.tokens) < 25 and file.stat().st_size <= ceiling + 30 * 60
    check(evidence, copies)


@pytest.mark.parametrize("field", ["top", "passages", "every", "ceiling"])
@pytest.mark.parametrize("value", [0, 1.5, True])
def test_settings_are_checked(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value}"):
        AuditSettings(**{field: value})


def test_what_cannot_be_audited_is_refused_with_what_to_do():
    model, tokenizer = tiny_model("llama"), characters()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with attach(model, OracleSelector(), SMALL, allow_dense=True) as run:
        with run.listen(Audit(tokenizer, TEXT)), pytest.raises(AuditError, match="batch of 1"):
            model(ids.expand(2, -1))
        longer = Audit(tokenizer, TEXT[:-3])
        with run.listen(longer), pytest.raises(AuditError, match="at least 46 tokens.*has 43"):
            model(ids)
        late = Audit(tokenizer, TEXT)
        cache = model(torch.cat((ids, prompt(1, 3)), 1)).past_key_values
        with run.listen(late), pytest.raises(AuditError, match="listen before generate"):
            model(prompt(1, 1), past_key_values=cache)
        used = Audit(tokenizer, TEXT)
        with run.listen(used):
            model(prompt(1, 1), past_key_values=model(ids).past_key_values)
            with pytest.raises(AuditError, match="new Audit"):
                model(ids)
    other = Audit(tokenizer, TEXT)
    with pytest.raises(AuditError, match="does not begin with the 46 tokens"):
        other.put(ids[:, 1:])
    with pytest.raises(AuditError, match="shape"):
        other.put(ids.expand(2, -1))


def test_tokens_may_be_told_afterwards_and_by_a_streamer_alike():
    model, tokenizer = tiny_model("llama"), characters()
    streamed, _, ids = audited(model, OracleSelector())
    told = Audit(tokenizer, TEXT)
    told.put(ids[:, : len(TEXT) + 2])
    told.put(ids)
    assert told.evidence.answer == streamed.evidence.answer and len(told.evidence.answer) == 5
    assert told.evidence.text_of(1) == tokenizer.decode(ids[0, len(TEXT) + 1])
    assert told.evidence.text_of(99) == ""
    streamed.put(ids)  # nothing new
    assert told.evidence.answer == streamed.evidence.answer


def test_listening_changes_nothing_and_ends():
    model, tokenizer = tiny_model("llama"), characters()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    with attach(model, OracleSelector(), SMALL) as run:
        before = model.generate(ids, **options)
        with run.listen(Audit(tokenizer, TEXT)) as audit:
            during = model.generate(ids, **options)
        size = len(audit.evidence.tokens)
        model.generate(ids, **options)
    assert torch.equal(before, during) and len(audit.evidence.tokens) == size == 5


def test_the_figure_shows_what_was_missed():
    from matplotlib.figure import Figure

    evidence = audited(tiny_model("llama"), OracleSelector())[0].evidence
    axis = Figure().add_subplot()
    for token in (None, 3):
        axis.clear()
        draw_missed(axis, evidence, token)
        tokens = evidence.tokens if token is None else [token]
        exact = [[sum(evidence.layer(t, layer).missed[head] for t in tokens) / len(tokens)
                  for head in range(4)] for layer in (0, 1)]  # fmt: skip
        assert axis.images[0].get_array().tolist() == [pytest.approx(row) for row in exact]


def test_evidence_that_is_none_says_so():
    audit, _, _ = audited(tiny_model("llama"), OracleSelector())
    with pytest.raises(AuditError, match="no evidence of answer token 0.*1, 2, 3, 4"):
        audit.evidence.layer(0, 0)
    empty = Audit(characters(), TEXT).evidence
    assert empty.tokens == [] and list(empty.rows()) == []


def test_frames_come_back_as_they_were():
    audit, _, _ = audited(tiny_model("llama"), OracleSelector())
    found = audit.evidence.layer(3, 1)
    again = LayerEvidence.from_frame(found.to_frame())
    for name, value in vars(found).items():
        assert np.array_equal(value, getattr(again, name)), name
