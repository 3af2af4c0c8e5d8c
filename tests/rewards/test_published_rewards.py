"""ImageReward, VideoAlign and GenEval: tiny random checkpoints in the published layouts and names, and their rules."""

import json
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.neural import SIZES, samples
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from fastgrpo.config import RewardSpec
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.rewards import load_reward
from fastgrpo.rewards.convert import convert_template
from fastgrpo.rewards.geneval import Found, conditions, relations
from fastgrpo.rewards.hpsv3 import PIXELS
from fastgrpo.rewards.hpsv3 import reward_head as preference_head
from fastgrpo.rewards.image_reward import MEAN, STD, ImageRewardModel
from fastgrpo.rewards.images import to_pil
from fastgrpo.rewards.published import COSTS
from fastgrpo.rewards.qwen2_vl import RewardModel, frame_size, to_patches
from fastgrpo.rewards.videoalign import Backbone, reward_head, sampled
from fastgrpo.shapes.tiny_clip import build_clip, save

PROMPTS = [Prompt(t) for t in ("a red circle", "two blue squares", "a red circle", "a cross left of a square")]


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    save(build_clip(SIZES, seed=0), SIZES, path)
    return path


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    return module.eval()


# ImageReward's names of the vision tower: timm's.
TIMM = (
    ("vision.embeddings.class_embedding", "blip.visual_encoder.cls_token"),
    ("vision.embeddings.position_embedding", "blip.visual_encoder.pos_embed"),
    ("vision.embeddings.patch_embedding.", "blip.visual_encoder.patch_embed.proj."),
    ("vision.post_layernorm.", "blip.visual_encoder.norm."),
    ("vision.encoder.layers.", "blip.visual_encoder.blocks."),
    (".self_attn.projection.", ".attn.proj."),
    (".self_attn.", ".attn."),
    (".layer_norm", ".norm"),
    ("text.", "blip.text_encoder."),
    ("head.", "mlp.layers."),
)


def published(name):
    for ours, theirs in TIMM:
        if ours.startswith(".") and not name.startswith("blip.visual_encoder"):
            continue
        name = name.replace(ours, theirs, 1) if ours.startswith(".") or name.startswith(ours) else name
    return name


def test_image_reward_is_its_published_parts(clip_path, tmp_path):
    from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig

    small: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
    }
    vision = BlipVisionConfig(**small, image_size=32, patch_size=16, layer_norm_eps=1e-6)
    text = BlipTextConfig(**small, vocab_size=100, encoder_hidden_size=128, max_position_embeddings=40)
    model = randomised(ImageRewardModel(vision, text))
    state = {published(k): v.contiguous() for k, v in model.state_dict().items()}
    assert "blip.visual_encoder.blocks.1.attn.qkv.weight" in state
    assert "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight" in state
    state |= {
        "blip.vision_proj.weight": torch.zeros(2, 128),
        "blip.text_encoder.embeddings.position_ids": torch.ones(1),
    }
    save_file(state, tmp_path / "ImageReward.safetensors")
    options = {"tokenizer": str(clip_path)}
    reward: Any = load_reward(
        RewardSpec(name="image_reward", path=str(tmp_path / "ImageReward.safetensors"), options=options)
    )
    images = samples(32, 32)
    scores = reward.score(images, PROMPTS, None)

    tokenizer = AutoTokenizer.from_pretrained(clip_path)
    tokens = tokenizer([p.text for p in PROMPTS], padding="max_length", max_length=35, return_tensors="pt")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.48145466, 0.4578275, 0.40821073),
                                                         (0.26862954, 0.26130258, 0.27577711)))  # fmt: skip
    with torch.no_grad():
        seen = model.vision(pixel_values=((images * 255).round() / 255 - mean) / std).last_hidden_state
        x = model.text(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=seen
        ).last_hidden_state[:, 0]
        for layer in model.head.values():
            x = layer(x)
    assert scores.values == pytest.approx(((x[:, 0] - MEAN) / STD).numpy(), abs=1e-4)
    assert np.ptp(scores.values) > 1e-3
    del state["mlp.layers.6.weight"]
    save_file(state | {"stray": torch.zeros(1)}, tmp_path / "bad.safetensors")
    bad = load_reward(RewardSpec(name="image_reward", path=str(tmp_path / "bad.safetensors"), options=options))
    with pytest.raises(ConfigError, match=r"1 missing \(head.6.weight\); 1 unexpected \(stray\)"):
        bad.score(images, PROMPTS, None)


TEMPLATE = "watch <|VQ_reward|> END move <|MQ_reward|> END text {text_prompt} rate <|TA_reward|> END"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A tiny Qwen2-VL's config and tokenizer, a template, and the weights of a reward model over it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("qwen")
    words = [
        "[UNK]",
        "[PAD]",
        *[
            "watch",
            "END",
            "move",
            "text",
            "rate",
            "a",
            "red",
            "circle",
            "blue",
            "square",
            "system",
            "user",
            "assistant",
            "You",
        ],
    ]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]")
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.save_pretrained(path)
    ids: dict[str, Any] = {t: tokenizer.convert_tokens_to_ids(t) for t in special}
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "intermediate_size": 64, "vocab_size": len(tokenizer) + 3, "bos_token_id": 1, "eos_token_id": 1,
            "rope_parameters": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3],
                                "rope_theta": 10000.0}}  # fmt: skip
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 14, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, video_token_id=ids["<|video_pad|>"],
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    config.save_pretrained(path)
    (path / "template.txt").write_text(TEMPLATE)
    return path, randomised(RewardModel(config, reward_head(32)), seed=2)


def old_names(model):
    """Those of transformers before 4.52, as the published checkpoint has them."""
    state = {k.removeprefix("qwen."): v.clone() for k, v in model.state_dict().items()}
    return {k.replace("language_model.", "model.", 1) if k.startswith("language_model.") else k: v
            for k, v in state.items()}  # fmt: skip


def new_names(model):
    state = {k.replace("qwen.", "model.", 1): v.clone() for k, v in model.state_dict().items()}
    return state | {"lm_head.weight": torch.zeros(2, 32)}


def videoalign(name, qwen, folder, state, **options):
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    options = {"template": str(qwen[0] / "template.txt"), "base": str(qwen[0]), "min_pixels": 28 * 28, **options}
    return load_reward(RewardSpec(name=name, path=str(folder / "model.safetensors"), options=options))


VIDEOS = torch.rand(2, 3, 8, 30, 60, generator=torch.Generator().manual_seed(0))
TEXTS = [Prompt("a red circle"), Prompt("a blue square a blue square")]


def test_videoalign_reads_old_and_new_names_and_a_lora(qwen, tmp_path):
    _, model = qwen
    expected = None
    lora = {f"base_model.model.{k}": v for k, v in old_names(model).items()}
    generator = torch.Generator().manual_seed(5)
    stem = "base_model.model.model.layers.1.self_attn.q_proj"
    whole = lora.pop(f"{stem}.weight")
    down, up = torch.randn(4, 32, generator=generator), torch.randn(32, 4, generator=generator)
    lora |= {f"{stem}.base_layer.weight": whole - 0.5 * up @ down, f"{stem}.lora_A.default.weight": down,
             f"{stem}.lora_B.default.weight": up}  # fmt: skip
    for number, state in enumerate((old_names(model), new_names(model), lora)):
        folder = tmp_path / str(number)
        reward = videoalign("videoalign_vq", qwen, folder, state, raw=True)
        if number == 2:
            with pytest.raises(ConfigError, match=r"put its model_config\.json beside it"):
                reward.score(VIDEOS, TEXTS, 8.0)
            (folder / "model_config.json").write_text(json.dumps({"peft_lora_config": {"lora_alpha": 2, "lora_r": 4}}))
        scores = reward.score(VIDEOS, TEXTS, 8.0)
        expected = expected if number else scores.values
        assert scores.values == pytest.approx(expected, abs=1e-4)
        assert scores.valid.all()
    state = old_names(model)
    del state["rm_head.weight"]
    with pytest.raises(ConfigError, match=r"1 missing \(rm_head.weight\)"):
        videoalign("videoalign_vq", qwen, tmp_path / "bad", state).score(VIDEOS, TEXTS, 8.0)


def test_videoalign_reads_its_three_tokens_in_one_pass(qwen, tmp_path):
    rewards: list[Any] = [videoalign(f"videoalign_{d}", qwen, tmp_path, new_names(qwen[1])) for d in ("vq", "mq", "ta")]
    backbone = rewards[0].backbone
    assert all(r.backbone is backbone for r in rewards)
    passes, inner = [], backbone.judge
    backbone.judge = lambda *a: passes.append(1) or inner(*a)
    vq, mq, ta = (r.score(VIDEOS, TEXTS, 8.0) for r in rewards)
    assert len(passes) == 1
    assert vq.components["MQ"] == pytest.approx(mq.values)
    raw = videoalign("videoalign_mq", qwen, tmp_path, new_names(qwen[1]), raw=True).score(VIDEOS, TEXTS, 8.0)
    assert mq.values == pytest.approx((raw.values - 1.1646) / 1.3811)
    # The prompt stands after the questions on quality, and before that on alignment.
    other = [Prompt("move watch text"), TEXTS[1]]
    again = [r.score(VIDEOS, other, 8.0) for r in rewards]
    assert again[0].values == pytest.approx(vq.values, abs=1e-5)
    assert again[1].values == pytest.approx(mq.values, abs=1e-5)
    assert abs(again[2].values[0] - ta.values[0]) > 1e-5
    assert again[2].values[1] == pytest.approx(ta.values[1], abs=1e-5)
    # Padding and neighbours change nothing.
    alone = rewards[2].score(VIDEOS[:1].clone(), TEXTS[:1], 8.0)
    assert alone.values[0] == pytest.approx(ta.values[0], abs=1e-5)
    rewards[0].release()
    assert backbone._last is None
    with pytest.raises(ConfigError, match="judges videos"):
        rewards[0].score(VIDEOS[:, :, 0], TEXTS, None)


def test_videoaligns_frames_and_patches_are_qwens(qwen, tmp_path):
    backbone: Backbone = cast(Any, videoalign("videoalign_vq", qwen, tmp_path, new_names(qwen[1]))).backbone
    assert backbone.module is not None
    image = (samples(70, 126, 1) * 255).round() / 255
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=448 * 448)
    theirs = processor(to_pil(image), return_tensors="pt")
    height, width = frame_size(70, 126, 28 * 28, 448 * 448)
    still = image[:, :, None].expand(-1, -1, 2, -1, -1)
    ours, grid = to_patches(still, height, width, backbone.vision)
    assert [list(grid)] == theirs["image_grid_thw"].tolist()
    assert ours.shape == theirs["pixel_values"].shape
    assert (ours - theirs["pixel_values"]).abs().max() < 0.03
    frames = torch.arange(53.0)[None, None, :, None, None]
    # 53 frames of 8 a second, two a second: 13, made even.
    assert sampled(frames, 8.0, 2.0).flatten().tolist() == torch.linspace(0, 52, 12).round().tolist()
    assert sampled(frames[:, :, :9], 8.0, 2.0).shape[2] == 4
    assert frame_size(720, 1280, 128 * 28 * 28, 448 * 448) == (336, 588)
    for size in ((512, 512), (720, 1280), (1328, 1328), (30, 60)):
        assert frame_size(*size, PIXELS, PIXELS) == smart_resize(*size, 28, PIXELS, PIXELS)


CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{}<|vision_end|>{}"
    "<|im_end|>\n<|im_start|>assistant\n"
)
QWEN2_VL_7B: dict[str, Any] = {
    "text_config": {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 151658,
    },
    "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584, "patch_size": 14},
}  # fmt: skip


def by_published_code(model, reward_ids, tokens, patches, grid, token_id):
    """The reward models' own forward, as transformers 4.45 had it: the language model is given embeddings alone, and so
    numbers its tokens one after the other."""
    ids, qwen = tokens["input_ids"], model.qwen
    words = qwen.get_input_embeddings()(ids)
    seen = qwen.visual(patches, grid_thw=torch.tensor([grid] * len(ids))).pooler_output
    words = words.masked_scatter((ids == token_id)[..., None].expand_as(words), seen)
    found = qwen.language_model(inputs_embeds=words, attention_mask=tokens["attention_mask"]).last_hidden_state
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    for token in reward_ids:
        chosen |= ids == token
    return model.rm_head(found)[chosen].view(len(ids), len(reward_ids), -1)


@torch.no_grad()
def test_videoaligns_scores_are_those_of_the_published_forward(qwen, tmp_path):
    backbone: Backbone = cast(Any, videoalign("videoalign_vq", qwen, tmp_path, new_names(qwen[1]))).backbone
    ours = backbone.score(VIDEOS, TEXTS, 2.0).components
    frames = sampled(VIDEOS, 2.0, 2.0)
    patches, grid = to_patches(frames, *frame_size(30, 60, *backbone.pixels), backbone.vision)
    video = "<|video_pad|>" * (grid[0] * grid[1] * grid[2] // 4)
    texts = [CHAT.format(video, TEMPLATE.format(text_prompt=p.text)) for p in TEXTS]
    tokens = backbone.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    video_id = backbone.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    theirs = by_published_code(qwen[1], backbone.reward_ids, tokens, patches, grid, video_id)
    for place, name in enumerate(("VQ", "MQ", "TA")):
        assert ours[name] == pytest.approx(theirs[:, place, place].numpy(), abs=1e-5)


QUESTIONNAIRE = "rate END {text_prompt} text "


@pytest.fixture(scope="module")
def preference(qwen, tmp_path_factory):
    """A reward model of HPSv3's layout over the same tiny Qwen2-VL, and a reward of it."""
    path = tmp_path_factory.mktemp("hpsv3")
    source = path / "data_collator_qwen.py"
    source.write_text(f'INSTRUCTION = """{QUESTIONNAIRE}"""\nprompt_with_special_token = "watch: <|Reward|> END"\n')
    convert_template(source, path / "template.txt")
    model = randomised(RewardModel(qwen[1].qwen.config, preference_head(32)), seed=4)
    with torch.no_grad():
        model.rm_head[-1].weight.mul_(100)  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]
    save_file(old_names(model) | {"lm_head.weight": torch.zeros(2, 32)}, path / "HPSv3.safetensors")
    options = {"template": str(path / "template.txt"), "base": str(qwen[0]), "pixels": 6 * 28 * 28}
    return model, RewardSpec(name="hpsv3", path=str(path / "HPSv3.safetensors"), options=options)


@torch.no_grad()
def test_hpsv3s_score_is_the_published_forwards_mean(preference):
    model, spec = preference
    reward: Any = load_reward(spec)
    # Of the size that they are resized to, and of whole levels: nothing is rounded on the way.
    images = (samples(56, 84, 2) * 255).round() / 255
    scores = reward.score(images, TEXTS, None)
    patches = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=2**20)(to_pil(images), return_tensors="pt")
    grid = tuple(patches["image_grid_thw"][0].tolist())
    assert grid == (1, 4, 6)
    question = QUESTIONNAIRE + "watch: <|Reward|> END"
    texts = [
        CHAT.format("<|image_pad|>" * (grid[1] * grid[2] // 4), question.format(text_prompt=p.text)) for p in TEXTS
    ]
    tokens = reward.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    image_id = reward.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    theirs = by_published_code(model, [reward.reward_id], tokens, patches["pixel_values"], grid, image_id)[:, 0]
    assert scores.values == pytest.approx(theirs[:, 0].numpy(), abs=1e-4)
    assert scores.components["spread"] == pytest.approx(theirs[:, 1].numpy(), abs=1e-4)
    assert abs(scores.values[0] - scores.values[1]) > 0.01
    # A prompt that quotes the token does not answer for the questionnaire; its neighbours change nothing.
    quoting = reward.score(images, [Prompt("a <|Reward|> circle"), TEXTS[1]], None).values
    assert quoting[1] == pytest.approx(scores.values[1], abs=1e-4)
    assert quoting[0] != pytest.approx(scores.values[0], abs=1e-3)
    # A video is its middle frame.
    video = torch.stack([images.flip(0), images, images.flip(0)], dim=2)
    assert reward.score(video, TEXTS, 8.0).values == pytest.approx(scores.values, abs=1e-5)


def test_hpsv3s_head_stays_in_float32(preference):
    model, spec = preference
    reward: Any = load_reward(spec.model_copy(update={"options": {**spec.options, "dtype": "bfloat16"}}))
    assert reward.score(samples(30, 60, 2), TEXTS, None).valid.all()
    assert {p.dtype for p in reward.module.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(reward.head.parameters(), model.rm_head.parameters(), strict=True))


def test_hpsv3_at_its_published_size_has_the_parameters_that_are_billed():
    config: Any = Qwen2VLConfig(**QWEN2_VL_7B)
    with torch.device("meta"):
        model = RewardModel(config, preference_head(config.text_config.hidden_size))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(COSTS["hpsv3"].parameters, rel=0.01)


def boxes(*edges, sure=0.95):
    return [Found(edge, sure) for edge in edges]


def test_genevals_rules():
    left, right, high = (0, 40, 20, 60), (80, 40, 100, 60), (80, 0, 100, 20)
    assert relations(*boxes(left, right)) == {"left of"}
    assert relations(*boxes(high, right)) == {"above"}
    assert relations(*boxes(left, left)) == set()
    found = {"dog": boxes(left), "cat": boxes(right, high)}

    def colors(name, objects):
        return ["red" if o.box == left else "blue" for o in objects]

    def holds(include, exclude=(), tag="x", found=found):
        return conditions({"include": include, "exclude": exclude, "tag": tag}, found, colors)

    assert holds([{"class": "dog", "count": 1}, {"class": "bird", "count": 1}]) == [True, False]
    assert holds([{"class": "cat", "count": 2}], [{"class": "cat", "count": 3}], "counting") == [True, True]
    assert holds([{"class": "cat", "count": 1}], [{"class": "cat", "count": 2}], "counting") == [True, False]
    unsure = {"cat": boxes(right, sure=0.5) + boxes(high, sure=0.2)}
    assert holds([{"class": "cat", "count": 1}], tag="counting", found=unsure) == [False]
    assert holds([{"class": "cat", "count": 1}], found=unsure) == [True]
    assert holds([{"class": "cat", "count": 2}], found=unsure) == [False]
    assert holds([{"class": "dog", "count": 1, "color": "red"}, {"class": "cat", "count": 1, "color": "red"}]) == [
        True, False
    ]  # fmt: skip

    def place(where):
        return [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": [where, 0]}]

    assert holds(place("left of")) == [True, True]
    assert holds(place("right of")) == [True, False]
    assert holds([{"class": "bird", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]) == [
        False, False
    ]  # fmt: skip


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    path = tmp_path_factory.mktemp("mask2former")
    swin = cast(Any, SwinConfig)(
        image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=5,
        id2label={0: "dog", 1: "cat", 2: "traffic light"},
    )  # fmt: skip
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(path)
    processor = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.23, 0.22, 0.23], "size_divisor": 32,
                 "size": {"shortest_edge": 64, "longest_edge": 120}}  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def test_geneval_finds_objects_with_a_detector_and_their_colours_with_clip(mask2former, clip_path, monkeypatch):
    monkeypatch.setattr("fastgrpo.rewards.geneval.THRESHOLD", 0.0)
    reward: Any = load_reward(RewardSpec(name="geneval", path=str(mask2former), options={"clip": str(clip_path)}))
    images = samples(48, 40)
    prompts = [
        Prompt("a dog", metadata={"include": [{"class": "dog", "count": 1, "color": "red"}]}),
        Prompt("a cat", metadata={"include": [{"class": "cat", "count": 1}]}),
        Prompt("a bird", metadata={"include": [{"class": "bird", "count": 1}]}),
        Prompt("nothing is asked"),
    ]
    scores = reward.score(images, prompts, None)
    assert scores.valid.tolist() == [True, True, True, False]
    assert scores.values[2] == 0
    assert set(scores.components) == {"strict", "soft"}
    with torch.no_grad():
        found = reward.detect(images)[0]
        assert set(found) <= {"dog", "cat", "traffic light"}
        for objects in found.values():
            assert [o.sure for o in objects] == sorted((o.sure for o in objects), reverse=True)
            x0, y0, x1, y1 = objects[0].box
            assert 0 <= x0 < x1 <= 40
            assert 0 <= y0 < y1 <= 48
        name, objects = next(iter(found.items()))
        assert len(reward.colors(images[0], name, objects)) == len(objects)
