"""Fields of the released `config.json`, and the settings of this package that they correspond to.

Import and export use the same tables, so they cannot disagree. This module does not read or write files.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from larp_jax import config as ours
from larp_jax.config import (
    FlowConfig,
    GeneratorConfig,
    PriorConfig,
    TokenizerConfig,
    TokenizerRecipe,
)
from larp_jax.errors import InputError

FLOW = "flow"  # `kind` in the config.json of a flow generator, which the released code does not have
REQUIRED = object()
ANY = object()
NONE_NAMES = ("none", None, "no", "null", "")


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a released `config.json`.

    Attributes:
      released: dotted path in the file.
      ours: dotted path in the configuration of this package; empty if it has no such setting.
      default: the released code's value if the field is missing.
      values: values of this package by released value, if they differ; export writes the last of several. Other values
        are the same in both.
      allowed: without `ours`, the values for which the released code computes the same as this package (export writes
        the first), or ANY if the field has no effect (export writes `default`).
    """

    released: str
    ours: str = ""
    default: Any = REQUIRED
    values: Mapping = dataclasses.field(default_factory=dict)
    allowed: Any = ()


# `bn_bn` has been folded into in_linear before; the released forward pass has no branch for `ln_d_na`.
NORMS = {None: "none", "no": "none", "ln_d_na": "none", "none": "none", "ln_d": "ln_d", "ln_nd": "ln_nd"}
_REGULARIZER = "bottleneck.args.regularizer"
TOKENIZER_FIELDS = (
    Field("bottleneck.name", allowed=("bottleneck",)),
    Field("bottleneck.args.bottleneck_dim", "quantizer.code_dim"),
    Field("bottleneck.args.norm", "quantizer.norm", None, values=NORMS),
    Field(f"{_REGULARIZER}.args.codebook_size", "quantizer.codebook_size"),
    Field("bottleneck_token_num", "num_tokens", 1024),
    Field("input_size", "resolution", 128),
    Field("frame_num", "frames", 16),
    Field("temporal_patch_size", "patch_frames", 4),
    Field("patch_size", "patch_size", 8),
    Field("decoder_temporal_patch_size", "decoder_patch_frames", 4),
    Field("decoder_patch_size", "decoder_patch_size", 8),
    Field("in_channels", "channels", 3),
    Field("transformer_name", allowed=("transformer_encoder_parallel",), default="transformer_encoder_parallel"),
    Field("encoder_name", allowed=(*NONE_NAMES, "transformer_encoder_parallel"), default=None),
    Field("decoder_name", allowed=(*NONE_NAMES, "transformer_encoder_parallel"), default=None),
    Field("latent_pe_scale_factor", "latent_position_base", 10000),
    Field("query_init_std", "query_init_std", 0.02),
    Field("encoder_hidden_size", "encoder.width", 768),
    Field("decoder_hidden_size", "decoder.width", 768),
    Field("encoder_num_heads", "encoder.heads", 12),
    Field("decoder_num_heads", "decoder.heads", 12),
    Field("encoder_depth", "encoder.depth", 6),
    Field("decoder_depth", "decoder.depth", 6),
    Field("learned_encoder_patch_pe", "learned_encoder_patch_pe", False),
    Field("learned_encoder_latent_query_embed", "learned_encoder_latent_query_embed", True),
    Field("learned_decoder_latent_pe", "learned_decoder_latent_pe", False),
    Field("learned_decoder_patch_query_embed", "learned_decoder_patch_query_embed", False),
    Field("use_encoder_patch_token_type_embed", "use_encoder_patch_token_type_embed", False),
    Field("use_encoder_latent_query_token_type_embed", "use_encoder_latent_query_token_type_embed", False),
    Field("use_decoder_latent_token_type_embed", "use_decoder_latent_token_type_embed", False),
    Field("use_decoder_patch_query_token_type_embed", "use_decoder_patch_query_token_type_embed", False),
    Field("encoder_query_gaussian_init", "encoder_query_gaussian_init", True),
)
# Settings of the regularizer `vq` besides the size of the codebook; `skl` has none.
VQ_FIELDS = (
    Field(f"{_REGULARIZER}.args.commitment_loss_weight", "quantizer.commitment_weight", 0.25),
    Field(f"{_REGULARIZER}.args.codebook_loss_weight", "quantizer.codebook_weight", 1.0),
    Field(f"{_REGULARIZER}.args.entropy_loss_weight", "quantizer.entropy_weight", 0.0),
    Field(f"{_REGULARIZER}.args.entropy_loss_temperature", "quantizer.entropy_temperature", 0.01),
    Field(f"{_REGULARIZER}.args.l2_normalized", "quantizer.l2_normalized", False),
    Field(f"{_REGULARIZER}.args.stochastic", "quantizer.kind", False, values={True: "svq", False: "vq"}),
    Field(f"{_REGULARIZER}.args.stochastic_temperature", "quantizer.temperature", 1.0),
)
PRIOR_FIELDS = (
    Field("args.l2_normalized", allowed=(True,), default=True),
    Field("n_rounds", "rounds"),
    Field("avg_loss_over_rounds", allowed=(True,)),
    Field("no_grad_before_last_round", allowed=(False,)),
    Field("latent_ce_temperature", "temperature"),
    Field("mix_ss_max_ratio", "mix_max"),
    Field("mix_ss_peak_steps_ratio", "mix_ramp"),
)
GENERATOR_FIELDS = (
    Field("dim", "width", 4096),
    Field("n_layer", "depth", 32),
    Field("n_head", "heads", 32),
    Field("n_kv_head", "kv_heads", None, values={None: 0}),
    Field("multiple_of", "mlp_multiple", 256),
    Field("ffn_dim_multiplier", "mlp_multiplier", None, values={None: 0.0}),
    Field("rope_base", allowed=ANY, default=10000),  # there are no rotary embeddings
    Field("norm_eps", "norm_epsilon", 1e-5),
    Field("initializer_range", "init_std", 0.02),
    Field("token_dropout_p", "token_dropout", 0.1),
    Field("attn_dropout_p", "attention_dropout", 0.0),
    Field("resid_dropout_p", "residual_dropout", 0.1),
    Field("ffn_dropout_p", "mlp_dropout", 0.1),
    Field("drop_path_rate", "path_dropout", 0.0),
    Field("num_classes", "num_classes", 101),
    Field("class_dropout_prob", "class_dropout", 0.1),
    Field("model_type", allowed=("class_cond",), default="class_cond"),
    Field("vocab_size", "codebook_size", 8192),
    Field("cls_token_num", "condition_tokens", 1),
    Field("max_batch_size", allowed=ANY, default=32),  # size of the cache for sampling
    Field("max_seq_len", "num_tokens", 1024),
    Field("use_fixed_pe", "fixed_positions", False),
    Field("frame_prediction", "frame_prediction", False),
)
# Prefixes of the names of model sizes in released configurations.
PRIOR_PREFIX, GENERATOR_PREFIX = "gptc-", "llama-abs-"
RELEASED_PRIOR_POSITIONS = 1024  # rows of the position table, unless `args.max_seq_len` is given


def _flatten(values: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dictionary of dotted paths."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _nest(flat: Mapping[str, Any]) -> dict:
    nested = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return nested


def _read_fields(fields: Iterable[Field], cls: type, flat: dict, where: str) -> dict[str, Any]:
    """Removes the fields from `flat`; returns settings of this package by dotted path."""
    found = {}
    for field in fields:
        if field.released not in flat and field.default is REQUIRED:
            raise InputError(f"{where} lacks the field {field.released}; add it with its value in the training run")
        value = flat.pop(field.released, field.default)
        if isinstance(value, str) and value.lower() in (*NONE_NAMES, *field.values):
            value = value.lower()  # the released code ignores the case of these
        if field.ours:
            found[field.ours] = _our_value(field, cls, value, where)
        elif field.allowed is not ANY and not any(type(value) is type(a) and value == a for a in field.allowed):
            raise InputError(
                f"{where}: {field.released}={value!r} is not supported, only {field.allowed[0]!r};"
                " this package does not implement that model"
            )
    return found


def _our_value(field: Field, cls: type, value: Any, where: str) -> Any:
    if (value is None or isinstance(value, bool | str)) and value in field.values:
        return field.values[value]
    kind = int if field.ours == "condition_tokens" else _field_type(cls, field.ours)
    if True in field.values:
        kind = bool
    return _typed(value, kind, field.released, where)


def _typed(value: Any, kind: type, name: str, where: str) -> Any:
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise InputError(f"{where}: {name} must be {kind.__name__}, got {value!r}")
    return value


def _field_type(cls: type, path: str) -> type:
    for part in path.split("."):
        cls = next(field.type for field in dataclasses.fields(cls) if field.name == part)
    return cls


def _write_fields(fields: Iterable[Field], config: Any) -> dict[str, Any]:
    """The released settings of a configuration, by dotted path."""
    flat = {}
    for field in fields:
        if field.ours:
            value = config
            for part in field.ours.split("."):
                value = getattr(value, part)
            theirs = {our: their for their, our in field.values.items()}
            flat[field.released] = theirs.get(value, value)
        else:
            flat[field.released] = field.default if field.allowed is ANY else field.allowed[0]
    return flat


def _refuse_rest(flat: Mapping, known: list[str], where: str) -> None:
    for name, value in flat.items():
        if value == {} and any(field.startswith(f"{name}.") for field in known):
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise InputError(f"{where}: {name} is not a known field of a released model; is {near} meant?")


def _label(numbers: tuple[int, int, int], table: Mapping[str, tuple]) -> str:
    return next((name for name, size in table.items() if size == numbers), "custom")


def _checked(make: Callable, fields: Iterable[Field], section: str, where: str) -> Any:
    """Calls `make`; its errors are raised again with the file and with the released names of the fields.

    Args:
      make: creates a configuration of this package.
      fields: the fields it was read from.
      section: the name of the configuration in error messages.
      where: the file.
    """
    try:
        return make()
    except (InputError, OverflowError) as error:
        theirs = {field.ours: field.released for field in fields if field.ours}
        names = "|".join(re.escape(name) for name in sorted(theirs, key=len, reverse=True))

        def translate(found):
            is_name = "." in found[0] or found.string[found.end() :].startswith("=")  # `heads` may also be a word
            return theirs[found[1]] if is_name else found[0]

        message = re.sub(rf"(?<![\w.])(?:{section}\.)?({names})(?![\w.])", translate, str(error))
        raise InputError(f"{where}: {message}") from None


def config_from_released(
    values: Mapping, shapes: Mapping[str, tuple[int, ...]], *, prior_sizes: Mapping | None = None, where: str
) -> TokenizerRecipe | GeneratorConfig | FlowConfig:
    """Converts a released configuration to one of this package. That of a flow generator has our names and a `kind`.

    Args:
      values: the contents of its `config.json`.
      shapes: shapes of its tensors, from which the size of a prior is derived if its name is not known.
      prior_sizes: `n_layer`, `n_head`, `n_embd`, `max_seq_len` of such a prior, if `prior.json` gives them.
      where: the name of the file in error messages.

    Raises:
      InputError: a field is missing, unknown or of the wrong type, or its value is not supported.
    """
    if values.get("kind") == FLOW:
        settings = {name: value for name, value in values.items() if name != "kind"}
        return _checked(lambda: ours.from_dict(FlowConfig, settings, "model"), (), "model", where)
    if "bottleneck" in values:
        return _tokenizer_from_released(values, shapes, prior_sizes, where)
    if {"dim", "n_layer"} & values.keys():
        return _generator_from_released(values, where)
    raise InputError(f"{where} describes neither a LARP tokenizer (no `bottleneck`) nor a generator (no `n_layer`)")


def _tokenizer_from_released(values, shapes, prior_sizes, where) -> TokenizerRecipe:
    prior_values = values.get("prior_model")
    flat = _flatten({key: value for key, value in values.items() if key != "prior_model"})
    regularizer = flat.pop(f"{_REGULARIZER}.name", None)
    found = _read_fields(TOKENIZER_FIELDS, TokenizerConfig, flat, where)
    if regularizer == "vq":
        found |= _read_fields(VQ_FIELDS, TokenizerConfig, flat, where)
        # as in the released code, a negative weight counts as 0, and only `svq` has a temperature
        found["quantizer.entropy_weight"] = max(0.0, found["quantizer.entropy_weight"])
        if found["quantizer.kind"] == "vq":
            del found["quantizer.temperature"]
        elif not found["quantizer.l2_normalized"]:
            raise InputError(
                f"{where}: {_REGULARIZER}.args.stochastic=True needs {_REGULARIZER}.args.l2_normalized=True;"
                " the released code cannot compute such a model either"
            )
    elif regularizer == "skl":
        found["quantizer.kind"] = "kl"
        for field in VQ_FIELDS:
            flat.pop(field.released, None)
    else:
        raise InputError(f"{where}: {_REGULARIZER}.name={regularizer!r} is not supported, only 'vq' and 'skl'")
    _refuse_rest(flat, [field.released for field in (*TOKENIZER_FIELDS, *VQ_FIELDS)], where)
    if found["latent_position_base"] <= 0:
        raise InputError(f"{where}: latent_pe_scale_factor must be positive, got {found['latent_position_base']}")
    for ours_name, name in (("patch_frames", "temporal_patch_size"), ("patch_size", "patch_size")):
        encoder, decoder = found[ours_name], found[f"decoder_{ours_name}"]
        if encoder != decoder:
            raise InputError(
                f"{where}: decoder_{name}={decoder} must equal {name}={encoder}; the released code assembles the"
                " decoder's patches with the size of the encoder's, so its videos are scrambled"
            )
    sizes = {tuple(found[f"{part}.{n}"] for n in ("width", "depth", "heads")) for part in ("encoder", "decoder")}
    found["size"] = _label(sizes.pop(), ours.TOKENIZER_SIZES) if len(sizes) == 1 else "custom"
    make = lambda: ours.from_dict(TokenizerConfig, _nest(found), "model")  # noqa: E731
    model = _checked(make, (*TOKENIZER_FIELDS, *VQ_FIELDS), "model", where)

    prior = None
    if prior_values is not None:
        if not isinstance(prior_values, Mapping):
            raise InputError(f"{where}: prior_model must be an object of settings, got {prior_values!r}")
        name = prior_values.get("name")
        if (name.lower() if isinstance(name, str) else name) not in NONE_NAMES:
            if not model.quantizer.has_codes:
                raise InputError(f"{where}: prior_model needs codes, but {_REGULARIZER}.name='skl' has none")
            prior = _prior_from_released(prior_values, shapes, prior_sizes, model, where)
    if prior is None:
        return TokenizerRecipe(model=model, loss=ours.LossConfig(prior_weight=0.0))
    return TokenizerRecipe(model=model, prior=prior)


def _prior_from_released(values, shapes, prior_sizes, model: TokenizerConfig, where) -> PriorConfig:
    where = f"{where} (prior_model)"
    flat = _flatten(values)
    name = flat.pop("name")
    found = _read_fields(PRIOR_FIELDS, PriorConfig, flat, where)

    def take(key, kind, default):
        return _typed(flat.pop(key, default), kind, key, where)

    if found["temperature"] <= 0:
        raise InputError(f"{where}: latent_ce_temperature must be positive, got {found['temperature']}")
    if found["mix_ramp"] < 0:
        raise InputError(f"{where}: mix_ss_peak_steps_ratio must not be negative, got {found['mix_ramp']}")
    # without scheduled mixing, later rounds read only sampled codes
    if not take("use_mix_ss", bool, True):
        found |= {"mix_max": 1.0, "mix_ramp": 0.0}
    rates = {take(f"args.{kind}_pdrop", float, 0.1) for kind in ("embd", "resid", "attn")}
    if len(rates) > 1:
        names = "args.embd_pdrop, args.resid_pdrop and args.attn_pdrop"
        raise InputError(f"{where}: {names} must be equal, got {sorted(rates)}")
    found["dropout"] = 0.0 if take("no_dropout", bool, False) else rates.pop()
    rows = take("args.max_seq_len", int, 0)
    known = [*(field.released for field in PRIOR_FIELDS), "use_mix_ss", "no_dropout", "args.max_seq_len"]
    _refuse_rest(flat, known, where)

    size, (width, depth, heads), table_rows = _prior_size(name, shapes, prior_sizes, where)
    found |= {"size": size, "width": width, "depth": depth, "heads": heads}
    rows = rows or table_rows or RELEASED_PRIOR_POSITIONS
    if rows < model.num_tokens - 1:
        raise InputError(
            f"{where}: args.max_seq_len={rows} positions are too few for bottleneck_token_num={model.num_tokens}"
        )
    found["positions"] = 0 if rows == model.num_tokens else rows
    return _checked(lambda: ours.from_dict(PriorConfig, found, "prior"), PRIOR_FIELDS, "prior", where)


def _prior_size(name, shapes, prior_sizes, where) -> tuple[str, tuple[int, int, int], int]:
    """Label, (width, depth, heads) and rows of the position table (0 if unknown) of a prior."""
    if not isinstance(name, str) or not name.startswith(PRIOR_PREFIX):
        raise InputError(f"{where}: name={name!r} is not a known prior; expected a name such as {PRIOR_PREFIX}S")
    size = name.removeprefix(PRIOR_PREFIX)
    shape = shapes.get("prior_model.pos_emb", ())
    rows, width = shape[1:] if len(shape) == 3 else (0, 0)
    if size in ours.PRIOR_SIZES:
        return size, ours.PRIOR_SIZES[size], rows
    if prior_sizes is not None:
        names = ("n_embd", "n_layer", "n_head", "max_seq_len")
        numbers = [prior_sizes.get(key) for key in names]
        if not all(type(n) is int and n > 0 for n in numbers):
            raise InputError(f"prior.json next to {where} must give {', '.join(names)} as positive integers")
        return size, tuple(numbers[:3]), numbers[3]
    depth = len({key.split(".")[2] for key in shapes if key.startswith("prior_model.blocks.")})
    heads = {known[2] for known in ours.PRIOR_SIZES.values() if known[0] == width}
    if len(heads) != 1 or not depth:
        raise InputError(
            f"{where}: name={name!r} is not a known size, and its tensors do not determine the number of heads; put a"
            ' prior.json {"prior": {"n_layer": ..., "n_head": ..., "n_embd": ..., "max_seq_len": ...}} next to it'
        )
    return size, (width, depth, heads.pop()), rows


def _generator_from_released(values, where) -> GeneratorConfig:
    flat = _flatten(values)
    found = _read_fields(GENERATOR_FIELDS, GeneratorConfig, flat, where)
    _refuse_rest(flat, [field.released for field in GENERATOR_FIELDS], where)
    positions = found.pop("condition_tokens")
    found["size"] = _label((found["width"], found["depth"], found["heads"]), ours.GENERATOR_SIZES)
    config = _checked(lambda: ours.from_dict(GeneratorConfig, found, "model"), GENERATOR_FIELDS, "model", where)
    _checked(lambda: config.mlp_width, GENERATOR_FIELDS, "model", where)
    if positions != config.condition_tokens:
        raise InputError(f"{where}: cls_token_num={positions} is not supported, only {config.condition_tokens} here")
    return config


def config_to_released(config: TokenizerRecipe | GeneratorConfig | FlowConfig) -> tuple[dict, dict | None]:
    """Converts a configuration to the released layout; also returns the size of a prior that has no name there.

    Raises:
      InputError: the released layout does not support a setting.
    """
    if isinstance(config, FlowConfig):
        return {"kind": FLOW, **ours.to_dict(config)}, None
    if isinstance(config, GeneratorConfig):
        if config.given not in ("class", "frames"):
            raise InputError(
                f"the released layout has no model.condition={config.given!r}, only 'class' and 'frames'"
            )
        if config.ladder:
            raise InputError(f"the released layout has no model.ladder={config.ladder}: its clips have one length")
        flat = _write_fields(GENERATOR_FIELDS, config)
        if config.kv_heads == config.heads:
            flat["n_kv_head"] = None
        return flat, None
    _refuse_inexpressible(config.model)
    flat = _write_fields(TOKENIZER_FIELDS, config.model)
    if not config.model.quantizer.has_codes:
        flat[f"{_REGULARIZER}.name"] = "skl"
    else:
        flat |= _write_fields(VQ_FIELDS, config.model) | {f"{_REGULARIZER}.name": "vq"}
    if not config.model.learned_encoder_latent_query_embed:
        flat["encoder_query_gaussian_init"] = False  # the released code rejects initialization of fixed queries
    if config.model.latent_position_base.is_integer():
        flat["latent_pe_scale_factor"] = int(config.model.latent_position_base)
    if not config.loss.prior_weight:
        return _nest(flat) | {"prior_model": {"name": "none"}}, None
    prior, sizes = _prior_to_released(config)
    return _nest(flat) | {"prior_model": _nest(prior)}, sizes


def _refuse_inexpressible(model: TokenizerConfig) -> None:
    known = {field.ours for field in (*TOKENIZER_FIELDS, *VQ_FIELDS)} | {"size"} | ours.TRAINING_FIELDS
    settings, defaults = _flatten(ours.to_dict(model)), _flatten(ours.to_dict(TokenizerConfig()))
    lost = [name for name, value in settings.items() if name not in known and value != defaults[name]]
    if model.decoder_patch != model.encoder_patch:  # the released decoder assembles with the encoder's patch
        lost += ["decoder_patch_frames", "decoder_patch_size"]
    if lost:
        lost = ", ".join(f"model.{name}={settings[name]!r}" for name in lost)
        raise InputError(f"the released layout does not support {lost}; use the stablehlo format instead")


def _prior_to_released(recipe: TokenizerRecipe) -> tuple[dict, dict | None]:
    prior = recipe.prior
    flat = _write_fields(PRIOR_FIELDS, prior)
    samples_only = prior.mix_max == 1.0 and prior.mix_ramp == 0.0
    flat |= {"use_mix_ss": not samples_only, "no_dropout": prior.dropout == 0.0}
    if prior.dropout not in (0.0, 0.1):
        flat |= {f"args.{kind}_pdrop": prior.dropout for kind in ("embd", "resid", "attn")}
    rows = prior.positions or recipe.model.num_tokens
    numbers = (prior.width, prior.depth, prior.heads)
    if ours.PRIOR_SIZES.get(prior.size) == numbers:
        if rows != RELEASED_PRIOR_POSITIONS:
            flat["args.max_seq_len"] = rows
        return flat | {"name": PRIOR_PREFIX + prior.size}, None
    size = "custom" if prior.size in ours.PRIOR_SIZES else prior.size
    sizes = {"n_layer": prior.depth, "n_head": prior.heads, "n_embd": prior.width, "max_seq_len": rows}
    return flat | {"name": PRIOR_PREFIX + size}, sizes
