"""Encoder-decoders in slot form: rows of several tasks and sources together, against `generate` of merged models."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from click.testing import CliRunner

from tests.helpers.exporters.decoding import bundle_loop, remembered
from tests.helpers.exporters.small_encoder_decoders import MODELS, START, generated, made, source, trained
from tpeft_deploy import export_bundle, load_adapter
from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.cli import main
from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.bases.known_components import known_components
from tpeft_deploy.exporters.oracle import compare
from tpeft_deploy.exporters.verify import verify_bundle

PROMPTS = [[START], [START, 7, 12, 40], [START, 5]]
TASKS = ["a", "b", "base"]

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def check_generation(bundle: Bundle, name: str, paths: dict[str, Path], count: int, layers: int = 1) -> None:
    """All rows generate what their merged models do, from past and present in one memory."""
    sources = [source(name, row) for row in range(len(TASKS))]
    loop = bundle_loop(bundle.components["decoder"], TASKS, count + 8, remembered(bundle, TASKS, sources))
    tokens, logits = loop.greedy(PROMPTS, count)
    for row, (task, prompt) in enumerate(zip(TASKS, PROMPTS, strict=True)):
        expected, own = generated(name, paths.get(task), sources[row], prompt, count, layers)
        assert tokens[row].tolist() == expected
        assert compare.relative_error(logits[row], own) <= 1e-5


@pytest.mark.parametrize("name", [pytest.param("t5", marks=pytest.mark.thorough), "whisper"])
def test_rows_of_tasks_and_sources_generate_together(tmp_path: Path, name: str) -> None:
    made(name).save_pretrained(tmp_path / "model")
    paths = trained(name, tmp_path)
    adapters = {task: load_adapter(path, base=made(name)) for task, path in paths.items()}
    bundle = export_bundle(tmp_path / "model", adapters, tmp_path / "bundle", generation=True)
    for part in bundle.components.values():
        assert part.manifest.rows == "each"
        assert all(part.oracle(task)["oracle"].startswith("peft") for task in paths)
    check_generation(bundle, name, paths, 32)


@pytest.mark.parametrize("name", MODELS)
def test_the_slot_form_computes_what_the_model_does(tmp_path: Path, name: str) -> None:
    made(name, 2).save_pretrained(tmp_path)
    found = known_components(tmp_path, generation=True)  # compares them
    assert found is not None
    ports = found["decoder"].base("decoder").decoder
    assert ports is not None
    assert (len(ports.memory), len(ports.caches), ports.start) == (4, 4, START)


@pytest.mark.soak
@pytest.mark.parametrize("name", MODELS)
def test_a_directory_exports_from_the_command_line_and_verifies(tmp_path: Path, name: str) -> None:
    made(name, 2).save_pretrained(tmp_path / "model")
    paths = trained(name, tmp_path, 2)
    args = ["export", "bundle", str(tmp_path / "model"), "--generation", "--out", str(tmp_path / "bundle")]
    result = CliRunner().invoke(main, [*args, *(f"--adapter={task}={path}" for task, path in paths.items())])
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(tmp_path / "bundle")
    parts = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    memory = tuple(f"cross.{part}" for part in parts)
    assert bundle.components["decoder"].manifest.decoder == DecoderPorts(
        tokens="input_ids",
        lengths="seqlens",
        logits="logits",
        caches=tuple((f"past_key_values.{part}", f"present.{part}") for part in parts),
        positions=512 if "t5" in name else 160,
        vocabulary=50,
        memory=memory,
        memory_lengths="memory_lengths",
        source="encoder",
        source_outputs=memory,
        start=START,
        source_positions=None if "t5" in name else 10 if name == "whisper" else 160,
    )
    assert [port.name for port in bundle.components["encoder"].manifest.outputs] == ["last_hidden_state", *memory]
    assert bundle.components["encoder"].manifest.decoder is None
    for base in (None, str(tmp_path / "model")):
        forms = {check.form for check in verify_bundle(bundle.path, base=base).checks}
        assert forms >= {"encoder mixed rows", "decoder mixed rows"}, forms
    check_generation(bundle, name, paths, 128, 2)


def test_a_model_without_a_decoder_is_refused(tmp_path: Path) -> None:
    transformers.CLIPConfig(architectures=["CLIPModel"]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()  # not read
    with pytest.raises(
        UnsupportedBase, match="for generation: expected a model with a decoder, got CLIPModel"
    ) as error:
        export_bundle(str(tmp_path), {}, tmp_path / "bundle", generation=True)
    assert "\n" not in str(error.value)


def test_a_model_of_images_of_any_size_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = transformers.PixtralVisionConfig(**sizes, image_size=16, patch_size=4)
    text = transformers.LlamaConfig(**sizes, vocab_size=50, num_key_value_heads=1)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=49)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    with pytest.raises(UnsupportedBase, match="images of one size, got pixtral") as error:
        export_bundle(str(tmp_path / "base"), {}, tmp_path / "bundle", generation=True)
    assert "\n" not in str(error.value)
