"""A stack written by hand: read as listed, refused in one line that helps."""

from __future__ import annotations

import importlib.util
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from simulator import load_model
from simulator.kernels.attention import Sinks, Window
from simulator.layers import REGISTRY, Attention, Embedding, GatedMLP, Head, Mamba2, MoE, ParallelMixers
from simulator.stack import LAYERS, MASKS
from tests.support import model

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "hybrid_stack.toml"
ATTENTION = {"kind": "Attention", "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rotary_dim": 128}
MLP = {"kind": "GatedMLP", "intermediate_size": 14336}
LLAMA = {"name": "llama", "hidden_size": 4096, "vocab_size": 128256, "blocks": [{"count": 32, "layers": [ATTENTION, MLP]}]}


def test_a_stack_is_the_model_its_config_describes() -> None:
    assert load_model(LLAMA).blocks == model("meta-llama/Meta-Llama-3.1-8B").blocks
    assert load_model(LLAMA).parameters() == model("meta-llama/Meta-Llama-3.1-8B").parameters()


def test_toml_json_and_yaml_say_the_same(tmp_path: Path) -> None:
    listed = tomllib.loads(EXAMPLE.read_text("utf-8"))
    whole = load_model(EXAMPLE)
    (tmp_path / "stack.json").write_text(json.dumps(listed), "utf-8")
    assert load_model(tmp_path / "stack.json").blocks == whole.blocks
    assert sum(count * len(block) for count, block in whole.blocks) == 96
    assert {type(layer).__name__ for layer in whole.layers} == {"GatedDeltaNet", "GatedMLP", "Attention", "MoE"}
    if importlib.util.find_spec("yaml") is None:
        (tmp_path / "stack.yaml").write_text(json.dumps(listed), "utf-8")
        with pytest.raises(ValueError, match="YAML needs PyYAML; pip install pyyaml"):
            load_model(tmp_path / "stack.yaml")
    else:
        (tmp_path / "stack.yaml").write_text(json.dumps(listed), "utf-8")
        assert load_model(tmp_path / "stack.yaml").blocks == whole.blocks


def test_masks_formats_and_branches_are_written_by_name() -> None:
    mamba = {"kind": "Mamba2", "mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4, "ssm_dtype": "fp32"}
    sinks = {**ATTENTION, "mask": {"kind": "Sinks", "sinks": 4, "width": 2044}, "weight": "fp8"}
    spec = load_model({**LLAMA, "blocks": [{"layers": [{"kind": "ParallelMixers", "branches": [sinks, mamba]}, MLP]}]})
    (parallel,) = (layer for layer in spec.layers if isinstance(layer, ParallelMixers))
    attention, scan = parallel.branches
    assert isinstance(attention, Attention)
    assert attention.mask == Sinks(4, 2044)
    assert attention.weight.name == "fp8"
    assert isinstance(scan, Mamba2)
    assert scan.ssm_dtype.name == "fp32"
    assert spec.cache_bytes(1e6) == 2048 * 4096 + 64 * 64 * 128 * 4 + 3 * (4096 + 2048) * 2


def test_every_layer_and_mask_has_a_name_to_write() -> None:
    assert set(LAYERS) == {kind.__name__ for kind in REGISTRY} - {Embedding.__name__, Head.__name__}
    assert MASKS["Window"] is Window
    assert {"Causal", "Window", "Chunked", "Sinks", "DualChunk", "Bidirectional", "TopK", "Blocks", "Banded", "BigBird"} <= set(MASKS)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"hidden_size": 0}, "hidden_size = 0 is not a positive integer"), ({"hidden_size": "wide"}, "hidden_size = 'wide'"), ({"blocks": []}, "blocks is not a list of blocks"),
        ({"width": 4}, "width: no such field; .*use .*hidden_size"), ({"blocks": [{"count": 2}]}, r"blocks\[0\] has no layers"),
        ({"blocks": [{"layers": [{"kind": "Atention"}]}]}, r"blocks\[0\].layers\[0\]: kind 'Atention' is not known; did you mean Attention\?"),
        ({"blocks": [{"layers": [{**MLP, "intermediate": 4}]}]}, "intermediate: no such field; did you mean intermediate_size"),
        ({"blocks": [{"layers": [{"kind": "GatedMLP"}]}]}, "lacks intermediate_size; write them"),
        ({"blocks": [{"layers": [{**MLP, "intermediate_size": 1.5}]}]}, "intermediate_size = 1.5 is not an integer"),
        ({"blocks": [{"layers": [{**ATTENTION, "qk_norm": 1}]}]}, "qk_norm = 1 is not true or false"),
        ({"blocks": [{"layers": [{**ATTENTION, "weight": "fp3"}]}]}, "weight format 'fp3': unknown"),
        ({"blocks": [{"layers": [{**ATTENTION, "mask": {"kind": "Windw", "width": 4}}]}]}, "kind 'Windw' is not known; did you mean Window"),
        ({"blocks": [{"count": -1, "layers": [MLP]}]}, "count = -1 is not a positive integer"), ({"blocks": [{"layers": ["Attention"]}]}, "kind 'Attention' is not known"),
        ({"cache": "fp3"}, "cache format 'fp3': unknown"), ({"embedding": 3}, "embedding = 3 is not a table"), ({"head": {"tide": True}}, "tide: no such field; did you mean tied"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_place_rule_and_remedy(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as refused:
        load_model({**LLAMA, **changed})
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_toml_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "stack.toml").write_text("a = ", "utf-8")
    with pytest.raises(ValueError, match=r"stack.toml: not TOML"):
        load_model(tmp_path / "stack.toml")


def test_a_hand_written_stack_has_experts_and_dense_layers() -> None:
    spec = load_model(EXAMPLE)
    assert sum(isinstance(layer, MoE) for layer in spec.layers) == 1
    assert any(isinstance(layer, GatedMLP) for layer in spec.layers)
    assert spec.cache_slope(1e6) == 12 * 2 * 4 * 128 * 2
