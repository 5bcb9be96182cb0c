"""The notebooks' experiments on the embedded model, also with records from a folder."""

from dataclasses import replace

import pandas as pd
import pytest

from hashattn import Budget, attach
from hashattn.evaluation.benchmarks.generated import generated_records
from hashattn.evaluation.records import Record, save_records
from hashattn.evaluation.tables import score_table
from hashattn.hashing import HashWeights
from hashattn.reproduce.access import load_model
from hashattn.reproduce.experiments import common as experiments
from hashattn.reproduce.experiments import contenders
from hashattn.reproduce.notebooks.claims import Claims
from hashattn.reproduce.profiles import (
    HASH_VARIANTS,
    METHODS,
    ProfileError,
    RulerRuns,
    load_profile,
)


@pytest.fixture(scope="module")
def profile():
    return load_profile("tiny")


@pytest.fixture(scope="module")
def loaded(profile):
    return load_model(profile)


@pytest.fixture(scope="module")
def weights(profile, loaded):
    return HashWeights.load(profile.hash_weights_path, loaded[0])


def test_the_embedded_model_is_what_its_card_says(loaded):
    model, tokenizer = loaded
    config = model.config
    assert type(model).__name__ == "LlamaForCausalLM"
    assert config.num_attention_heads == 4 * config.num_key_value_heads
    assert (config.head_dim, config.max_position_embeddings) == (64, 8192)
    assert sum(p.numel() for p in model.parameters()) == 4_589_824
    assert len(tokenizer) == config.vocab_size == 4096


def test_shipped_weights_are_trained_for_this_model(weights, profile):
    assert weights.trained and weights.config.bits == 32
    assert weights.config.layout == "per_kv_head"
    assert "training split only" in weights.card["data"]["note"]


def test_official_records_are_read_from_the_profiles_folder(profile, loaded, weights, tmp_path):
    made = generated_records(loaded[1], 1024, 2, seed=profile.seed, tasks=("lookup", "code"))
    for task in ("lookup", "code"):
        save_records([r for r in made if r.dataset == task], tmp_path / f"{task}.jsonl")
    own = replace(profile, data=str(tmp_path), tasks=("lookup", "code"), densities=(0.125,),
                  methods=("dense", "hash"))  # fmt: skip
    chosen = experiments.methods(own, experiments.selectors(own, weights, []))
    found = experiments.quality(own, *loaded, chosen, 1024, progress=False)
    assert found["setup"].tolist() == 8 * ["A"] + 8 * ["B"]
    assert set(found["dataset"]) == {"lookup", "code"}
    assert found[found.method == "hash"]["density"].max() <= 0.13
    assert found[found.method == "dense"]["score"].mean() > 0.5


def test_ruler_runs_at_every_length_in_both_setups(profile, loaded, weights):
    own = replace(profile, methods=("dense", "hash"), densities=(0.125,),
                  ruler=RulerRuns(("niah_single_2", "vt"), (1024, 1536), 1, "facts"))  # fmt: skip
    chosen = experiments.methods(own, experiments.selectors(own, weights, []))
    found = experiments.ruler(own, *loaded, chosen, progress=False)
    assert len(found) == 2 * 2 * 2 * 2
    keys = ["tokens", "setup", "method", "dataset"]
    assert not found.duplicated(keys).any()
    assert (found["length"] <= found["tokens"]).all()
    assert (found["length"] >= 0.99 * found["tokens"]).all()
    asked = found.drop_duplicates("dataset").set_index("dataset")["protocol_fields"]
    assert asked["vt"]["max_new_tokens"] == 30 and asked["vt"]["stop"] == "\n"
    dense = found[(found.method == "dense") & (found.dataset == "niah_single_2")]
    assert (dense["score"] == 1).all()
    assert found[found.method == "hash"]["density"].max() <= 0.13


def test_dense_quality_is_claimed_of_generated_tasks_alone(profile, tmp_path):
    def claimed(profile):
        claims = Claims("03_longbench", tmp_path)
        budgets = ["dense", "32x", "0 tokens"]
        names = ["dense", "oracle", "hash", "window", "double_sparsity", "quest"]
        scores = pd.DataFrame(30.0, index=names, columns=budgets)
        experiments.quality_claims(claims, scores, scores, profile)
        return [record.claim for record in claims.records if "dense exact match" in record.claim]

    assert len(claimed(profile)) == 3
    assert claimed(replace(profile, data=str(tmp_path))) == []


def score_tables(dense, window, ours=None):
    """A score table in which everything but dense attention and the window scores `ours`."""
    names = ["dense", "oracle", "hash", "double_sparsity", "quest", "residual", "window"]
    table = pd.DataFrame(float("nan"), index=names, columns=["dense", "16x", "32x", "0 tokens"])
    table.loc[names[1:-1], ["16x", "32x"]] = dense if ours is None else ours
    table.loc["dense", "dense"], table.loc["window", "0 tokens"] = dense, window
    return table


def judged(profile, folder, scores):
    claims = Claims("03_longbench", folder)
    experiments.quality_claims(claims, scores, scores, profile)
    return {claim.claim: claim for claim in claims.records}


@pytest.mark.parametrize(
    ("dense", "window", "why"),
    [
        (0.0, 0.0, "dense attention scores 0 points; a comparison needs 10"),  # none answered
        (9.9, 0.0, "dense attention scores 9.9 points"),
        (float("nan"), 0.0, "dense attention scores nan points"),
        (40.0, 40.0, "sink and local alone reach 40"),  # nothing is at stake
        (40.0, 55.0, "sink and local alone reach 55"),
    ],
)
def test_nothing_is_judged_against_a_floor_that_is_dead(profile, tmp_path, dense, window, why):
    own = replace(profile, data=str(tmp_path))
    found = judged(own, tmp_path, score_tables(dense, window))
    assert len(found) == 6 and {c.verdict for c in found.values()} == {"not judged"}
    assert all(why in c.reason for c in found.values())
    main = [name for name, c in found.items() if c.main]
    assert main == [f"HashAttention at {x} minus dense (points)" for x in ("16x", "32x")]


def test_a_floor_that_works_is_judged_as_before(profile, tmp_path):
    found = judged(profile, tmp_path, score_tables(99.0, 1.0))
    assert {name: (c.verdict, c.ours) for name, c in found.items()} == {
        "dense exact match, frontier length": ("holds", 99.0),
        "dense exact match at the frontier length": ("met", 99.0),
        "dense exact match at the longest": ("met", 99.0),
        "sink and local alone, exact match": ("met", 1.0),
        "oracle top-k at 32x minus dense (points)": ("met", 0.0),
        "with a sampled residual minus oracle top-k, 8x and 16x, worst (points)": ("met", 0.0),
        "HashAttention at 16x minus dense (points)": ("met", 0.0),
        "HashAttention at 32x minus dense (points)": ("met", 0.0),
        "HashAttention minus double_sparsity, worst of the densities (points)": ("met", 0.0),
        "HashAttention minus quest, worst of the densities (points)": ("met", 0.0),
    }
    found = judged(replace(profile, data=str(tmp_path)), tmp_path, score_tables(25.0, 15.0, 0.0))
    assert found["HashAttention at 32x minus dense (points)"].verdict == "not met"  # 10 at stake


def test_a_run_without_the_window_or_a_baseline_is_judged_by_dense_alone(profile, tmp_path):
    own = replace(profile, data=str(tmp_path))
    few = score_tables(50.0, 0.0).loc[["dense", "hash"]]
    found = judged(own, tmp_path, few)
    assert [c.verdict for c in found.values()] == ["met", "met"]
    found = judged(own, tmp_path, 0 * few)
    assert [c.verdict for c in found.values()] == ["not judged", "not judged"]


def test_the_embedded_model_cannot_answer_company_texts(profile, loaded, weights, tmp_path):
    """The run that reported success: two contracts, none answered, one answer cut away."""
    made = [
        Record("違約金は", 20 * "第三条 乙は契約上の権利を譲渡しない。" + "違約金は三百万円である。"
               + 20 * "第四条 甲は通知する。", ("三百万円",), dataset="contracts"),
        Record("Who signs?", "Ms Sato signs. " + 150 * "The parties agree. ", ("Ms Sato",),
               dataset="contracts"),
    ]  # fmt: skip
    save_records(made, tmp_path / "contracts.jsonl")
    own = replace(profile, data=str(tmp_path), tasks=("contracts",), densities=(1 / 16,),
                  methods=("dense", "window", "hash"))  # fmt: skip
    chosen = experiments.methods(own, experiments.selectors(own, weights, []))
    both = experiments.quality(own, *loaded, chosen, 600, samples=2, progress=False)
    scores = score_table(both[both.setup == "B"])
    assert scores.attrs["cut"] == "2 of 2 contexts were cut, 1 answers lost"
    (claim,) = judged(own, tmp_path, scores).values()
    assert claim.ours == 0 and claim.verdict == "not judged"
    assert claim.reason == "dense answers 0 of 2 questions, 0 points; a comparison needs 10"


@pytest.mark.parametrize("benchmark", ["longbench", "longbench_authors"])
def test_longbench_profiles_ask_each_dataset_in_its_own_way(
    profile, loaded, weights, tmp_path, benchmark
):
    text = "The museum opens at nine in the morning and closes late.\n" * 60
    types = {"all_classes": ("Place", "Person")}
    asked = {
        "lcc": Record("", text, ("x = 1",)),
        "passage_count": Record("", text, ("1",)),
        "trec_e": Record("Type:", text, ("Place",), **types),
    }
    for name, record in asked.items():
        save_records([record, record], tmp_path / f"{name}.jsonl")
    own = replace(profile, data=str(tmp_path), tasks=tuple(asked), benchmark=benchmark, chat=False,
                  densities=(0.125,), methods=("dense", "hash"))  # fmt: skip
    made = experiments.protocol(own, 700)
    assert made.of("lcc").metric == "code_sim" and made.of("trec_e").metric == "classification"
    assert (made.sink, made.local, made.seed) == (own.sink, own.local, own.seed)
    assert (made.of("lcc").truncated == "chat") == (benchmark == "longbench_authors")
    chosen = experiments.methods(own, experiments.selectors(own, weights, []))
    both = experiments.quality(own, *loaded, chosen, 700, samples=1, progress=False)
    found = both[both.setup == "B"].reset_index()
    assert found["dataset"].tolist() == list(asked) * 2
    assert found[found.method == "hash"]["density"].max() <= 0.13
    whole = found["context_tokens"][0] + 128
    assert benchmark == "longbench" or whole == 700 - 64


def test_the_papers_profiles_take_each_datasets_own_protocol(monkeypatch, tmp_path):
    monkeypatch.setenv("HASHATTN_DATA_DIR", str(tmp_path))
    for name in ("llama-3.1-8b", "mistral-7b"):
        paper = load_profile(name)
        for task in paper.tasks:
            (tmp_path / f"{task}.jsonl").touch()
        made = experiments.protocol(paper, paper.longest_length)
        asked = [made.of(task) for task in paper.tasks]
        assert {p.metric for p in asked} >= {"qa_f1", "rouge_l", "classification", "code_sim"}
        assert all(p.max_context == paper.longest_length for p in asked)
        assert made.of("qasper").chat and not made.of("trec").chat
        assert (made.sink, made.local) == (128, 128)


@pytest.mark.parametrize("name", ["llama-3.1-8b-authors", "llama-3.1-8b-longbench-e"])
def test_a_limit_of_prompts_goes_before_the_length(monkeypatch, tmp_path, name):
    monkeypatch.setenv("HASHATTN_DATA_DIR", str(tmp_path))
    paper = load_profile(name)
    for task in paper.tasks:
        (tmp_path / f"{task}.jsonl").touch()
    made = experiments.protocol(paper, paper.frontier_length)
    assert made.max_context == paper.prompt_limit == 131072
    assert (made.truncated, made.window) == (
        ("chat", 128) if paper.benchmark == "longbench_authors" else ("prompt", None)
    )


def test_training_sequences_mix_lengths_of_the_training_split(profile, loaded):
    longest = 2048
    profile = replace(profile, training=replace(profile.training, length=longest))
    found = experiments.training_sequences(profile, loaded[1], 4)
    lengths = [len(ids) for ids, _ in found]
    wanted = [longest, longest, longest // 2, longest // 4]
    assert all(0.7 * w < n <= w for w, n in zip(wanted, lengths, strict=True))


def test_every_sparse_method_gets_every_density_and_the_window_one(profile, loaded, weights):
    calibrated = experiments.captured(profile, *loaded, 1024, split="train")
    codes = contenders.our_codes(profile, *loaded, weights)
    chosen = experiments.selectors(profile, weights, calibrated, codes)
    assert chosen["hash_128"].auxiliary_bits(4, 64) == 128
    assert chosen["hash_official"].auxiliary_bits(4, 64) == 128
    chosen = experiments.methods(profile, chosen)
    labels = [(m.name, m.budget_label) for m in chosen]
    sparse = len(profile.methods) - 2  # dense and the window alone have one budget each
    assert len(labels) == len(set(labels)) == 2 + sparse * len(profile.densities)


def test_every_method_answers_within_its_budget(profile, loaded, weights):
    """All selectors through the one attention path, from the prefill on."""
    model, tokenizer = loaded
    every = replace(profile, methods=(*METHODS, *HASH_VARIANTS))
    calibrated = experiments.captured(profile, *loaded, 512, split="train")
    codes = contenders.our_codes(every, model, tokenizer, weights)
    chosen = experiments.selectors(every, weights, calibrated, codes)
    assert set(chosen) == {*METHODS, *HASH_VARIANTS} - {"dense"}
    record = generated_records(tokenizer, 1024, 1, seed=profile.seed, tasks=("lookup",))[0]
    ids = tokenizer(f"{record.context}\nQ: {record.input}", return_tensors="pt").input_ids
    for name, selector in chosen.items():
        with attach(model, selector, Budget(4, 28, density=1 / 8), keep_steps=99) as run:
            out = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        steps = [step for step in run.receipt.recent if step.reason is None]
        assert out.shape[1] > ids.shape[1] and len(steps) >= 4, name
        within = [step.read <= step.cached / 8 for step in steps]
        # a certificate may ask for more, here in some layers
        assert any(within) and not all(within) if name == "certified" else all(within), name
        assert selector.needs in ("nothing", "calibration", "training"), name
        assert selector.auxiliary_bits(4, 64) >= 0, name


def test_a_profile_that_learns_from_text_measures_on_its_kinds(profile, loaded):
    training = replace(profile.training, texts=("documentation",), length=1024)
    reader = replace(profile, training=training, texts=("code", "minutes"), layers=(1, 3))
    assert experiments.text_kinds(reader, "train") == ("documentation",)
    assert experiments.text_kinds(reader, "eval") == ("code", "minutes")
    assert experiments.text_kinds(profile, "eval") == ()
    train, held_out = (
        experiments.training_sequences(reader, loaded[1], 4, split)
        for split in ("train", "validation")
    )
    assert [len(ids) for ids, _ in train] == [1024, 1024, 512, 512]
    assert not {tuple(ids.tolist()) for ids, _ in train} & {tuple(i.tolist()) for i, _ in held_out}
    layers = experiments.captured(reader, *loaded, 512)
    assert [layer.layer for layer in layers] == [1, 3]
    every = experiments.captured(reader, *loaded, 512, every_layer=True)
    assert [layer.layer for layer in every] == [0, 1, 2, 3]


def test_what_is_shipped_follows_the_profile():
    pretrained = load_profile("smollm2")
    assert list(experiments.shipped(pretrained)) == ["default", "64_bits", "128_bits"]
    assert list(experiments.shipped(load_profile("embedded"))) == ["default", *experiments.VARIANTS]
    with pytest.raises(ProfileError, match="hash_weights = None: must be the folder to ship in"):
        experiments.shipped(replace(pretrained, hash_weights=None))


def test_layers_that_are_measured_train_again_where_all_are_shipped(profile, monkeypatch):
    monkeypatch.setattr(experiments, "train_hashes", lambda *_, layers=None: layers)
    some = replace(profile, layers=(1, 3))
    assert experiments.retrained(some, None, None, "default") == (1, 3)
    assert experiments.retrained(profile, None, None, "default") is None
    for alone in (replace(some, hash_weights=None), replace(some, hash_weights="nowhere")):
        assert experiments.retrained(alone, None, None, "default") is None


def test_captures_are_kept_while_they_fit(profile, loaded, monkeypatch):
    calls = []
    original = experiments.capture
    monkeypatch.setattr(experiments, "_kept", type(experiments._kept)())
    monkeypatch.setattr(
        experiments, "capture", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )

    def again(seed):
        return experiments.captured(profile, *loaded, 512, 1, seed=seed, values=True)

    first = again(1)
    assert again(1)[0] is first[0] and len(calls) == 1
    assert again(2)[0] is not first[0] and again(1)[0] is first[0] and len(calls) == 2
    monkeypatch.setattr(experiments, "KEPT_BYTES", 1)
    again(3)
    assert len(experiments._kept) == 1
    assert (again(1)[0].keys == first[0].keys).all() and len(calls) == 4
