"""What quantization-aware training elsewhere gets silently wrong, and for each the test that fails here once our
handling is taken out; benchmarks/break_each.py does that.

Where our handling is to leave something alone, what is put in does what others do to it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Break:
    """One handling and its test.

    Attributes:
        what: Goes wrong elsewhere.
        test: Node id; fails when broken.
        file: Holds the handling.
        old: Text that occurs once in the file.
        new: Stands in its place when broken.
        fails: Begins the message that the test then fails with.
    """

    what: str
    test: str
    file: str
    old: str
    new: str
    fails: str = "AssertionError"


NOT_RAISED = "Failed: DID NOT RAISE"
KNOWN = "tests/test_known_failures.py::test_"
LIGHTNING = "tests/test_lightning.py::test_"
MODULE = "tests/test_compose_module.py::test_"

LIGHTNINGS_CALLBACK = [
    Break(
        "load_from_checkpoint",
        f"{MODULE}checkpoints_cross_between_float_and_quantized",
        "qat/lightning/module.py",
        "                split_state(checkpoint, {name for name, module in modules if isinstance(module, Quantizer)})",
        "                pass",
        "RuntimeError: Error(s) in loading state_dict",
    ),
    Break(
        "test(ckpt_path) after fit",
        f"{MODULE}the_best_checkpoint_is_tested_after_early_stopping",
        "qat/lightning/weights.py",
        '        checkpoint["state_dict"] = {**checkpoint["state_dict"], **split}',
        "        pass",
        "RuntimeError: Error(s) in loading state_dict",
    ),
    Break(
        "forward with several arguments and keywords",
        f"{KNOWN}a_forward_of_several_arguments_and_keywords_keeps_its_signature",
        "qat/layers/sites.py",
        "else self._outermost(modes, args, kwargs)",
        "else self._outermost(modes, args, {})",
        "TypeError: ",
    ),
    Break(
        "observers fed by validation data",
        f"{LIGHTNING}sanity_checks_and_validation_never_move_ranges[minmax]",
        "qat/quantizers/base.py",
        "if follow and self.follows and self.training:",
        "if follow and self.follows:",
    ),
    Break(
        "together with a pruning callback",
        f"{MODULE}pruned_weights_stay_zero_on_the_grid_and_their_scales_still_learn[False]",
        "qat/layers/base.py",
        "        if weight is None:  # computed by a parametrization\n            weight = self.weight\n",
        "        if weight is None:\n            return self.weight\n",
    ),
    Break(
        "conversion at the end breaks checkpoints",
        f"{KNOWN}converting_after_fit_leaves_the_module_and_its_best_checkpoint_as_they_are",
        "qat/convert.py",
        "converted = copied(model).cpu().eval()",
        "converted = model.cpu().eval()",
        "RuntimeError: Error(s) in loading state_dict",
    ),
    Break(
        "steps that do not call forward",
        f"{KNOWN}a_step_that_does_not_call_forward_is_quantized_by_what_it_calls",
        "qat/planning/recording.py",
        "        if any(call.inside for call in self.order):",
        "        if self.order:",
        "qat.errors.UserError: ",
    ),
]
"""The seven failures of Lightning's removed `QuantizationAwareTraining` callback."""

SILENT = [
    Break(
        "a rule that matches nothing",
        "tests/test_policy.py::test_a_rule_that_matches_nothing_is_an_error[name]",
        "qat/policies/patterns.py",
        "    if not found:\n",
        "    if False:\n",
        NOT_RAISED,
    ),
    Break(
        "layers built in configure_model, missed by insertion or by the optimizer",
        f"{LIGHTNING}layers_are_found_wherever_they_are_built_and_their_scales_are_trained[configure_model]",
        "qat/lightning/callback.py",
        "        after_configure(pl_module, lambda: self._insert(trainer, pl_module))",
        "        pass",
    ),
    Break(
        "a module under two names",
        f"{KNOWN}a_module_under_two_names_is_one_layer_with_one_grid",
        "qat/planning/probe.py",
        "root.named_modules() if not _is_metric(module)}",
        "root.named_modules(remove_duplicate=False) if not _is_metric(module)}",
        "qat.errors.UserError: ",
    ),
    Break(
        "a module held in a dict",
        f"{KNOWN}a_module_that_only_a_dict_knows_is_in_the_audit",
        "qat/planning/audit.py",
        "for calls in own.values() for c, row in self._functions(calls))",
        "for calls in () for c, row in self._functions(calls))",
    ),
    Break(
        "the fused path of TransformerEncoderLayer in eval",
        "tests/test_layers_attention.py::"
        "test_evaluation_without_gradients_runs_the_quantized_layers[layer-weights-only]",
        "qat/insert.py",
        "            become_twin(module, SlowPath)",
        "            pass",
    ),
    Break(
        "subclasses losing their parameters or forward",
        "tests/test_twins.py::test_subclasses_keep_their_class_and_methods",
        "qat/layers/twin.py",
        "        module.__class__ = _stack(original, [*mixins, mixin])",
        '        module.__class__ = _stack(getattr(mixin, "serves", original), [*mixins, mixin])',
    ),
    Break(
        "forward hooks and attributes lost",
        "tests/test_twins.py::test_hooks_and_attributes_of_the_user_survive",
        "qat/layers/twin.py",
        "        module.__class__ = _stack(original, [*mixins, mixin])",
        "        module.__class__ = _stack(original, [*mixins, mixin])\n        module._forward_hooks.clear()",
    ),
    Break(
        ".training lost",
        f"{KNOWN}modes_batch_norm_settings_and_dropout_are_left_alone",
        "qat/modes.py",
        "            module.training = training",
        "            module.train()",
    ),
    Break(
        "BatchNorm's eps and momentum rewritten",
        f"{KNOWN}modes_batch_norm_settings_and_dropout_are_left_alone",
        "qat/insert.py",
        "    become_twin(norm, FoldingNorm)",
        "    become_twin(norm, FoldingNorm)\n    norm.eps = 1e-5",
    ),
    Break(
        "dropout's p changed by a switch of modes",
        f"{KNOWN}modes_batch_norm_settings_and_dropout_are_left_alone",
        "qat/modes.py",
        "    model.eval()\n    try:",
        "    model.eval()\n    for module in model.modules():\n        if isinstance(module, nn.Dropout):\n"
        "            module.p = 0.0\n    try:",
    ),
    Break(
        "a layer left float without a word",
        "tests/test_audit.py::test_what_stays_float_says_why[subclass]",
        "qat/planning/reasons.py",
        "        return self._no_twin(module)",
        "        return None",
    ),
    Break(
        "a bias without gradient",
        f"{KNOWN}every_bias_has_a_gradient",
        "qat/layers/base.py",
        '(self.training and self.round_bias != "train"):\n            return bias',
        '(self.training and self.round_bias != "train"):\n            return None if bias is None else bias.detach()',
    ),
    Break(
        "an asymmetric default that gives a wrong scale",
        "tests/test_ranges.py::"
        "test_any_finite_numbers_give_a_grid_with_a_positive_scale_and_an_exact_zero[uint2-affine-minmax]",
        "qat/grid/ranges.py",
        "    return x.amin(1).clamp_max(0), x.amax(1).clamp_min(0)",
        "    return x.amin(1), x.amax(1)",
    ),
    Break(
        "observers fed by validation or sanity checks",
        f"{LIGHTNING}sanity_checks_and_validation_never_move_ranges[minmax]",
        "qat/quantizers/base.py",
        "if follow and self.follows and self.training:",
        "if follow and self.follows:",
    ),
    Break(
        "observing twice under gradient checkpointing",
        "tests/test_compose_checkpointing.py::"
        "test_recomputing_a_block_changes_no_gradient_range_or_count[non-reentrant-minmax]",
        "qat/quantizers/minmax.py",
        "        if not x.numel() or recomputing():",
        "        if not x.numel():",
    ),
    Break(
        "a learned scale that does not reload into a fresh model",
        f"{LIGHTNING}a_checkpoint_is_tested_resumed_and_loaded_by_the_plain_class[init]",
        "qat/lightning/module.py",
        "            insert_plan(self, plan)  # pyright",
        "            pass  # pyright",
        "RuntimeError: Error(s) in loading state_dict",
    ),
    Break(
        "scales that reach 0 or turn negative",
        "tests/test_scales.py::test_whatever_an_optimizer_does_to_a_scale_it_acts_as_a_positive_number[float32--1.0]",
        "qat/grid/scales.py",
        "    return positive(scale)\n",
        "    return scale\n",
    ),
    Break(
        "weight decay on scales",
        f"{LIGHTNING}scales_have_a_group_of_their_own[sgd-decides-parameters]",
        "qat/lightning/scale_groups.py",
        'own = {"params": some, "weight_decay": 0.0, FACTOR: by,',
        'own = {"params": some, FACTOR: by,',
    ),
    Break(
        "4-bit files that hold bytes or floats",
        "tests/test_packed.py::test_four_bits_are_four_bits_in_the_file",
        "qat/export/packed.py",
        '        tensors[key] = pack(value, layout["bits"], layout["first_code"], layout["distance"])',
        "        tensors[key] = value.detach().clone()",
    ),
    Break(
        "4-bit files that hold bytes (ONNX)",
        "tests/test_onnx.py::test_codes_are_stored_in_two_four_or_eight_bits_and_computed_with_as_integers[4-4-symmetric]",
        "qat/export/onnx/weights.py",
        "            _pack(model.graph, codes, node, size)",
        "            pass",
    ),
    Break(
        "an export bigger than the float one",
        "tests/test_onnx.py::test_the_file_is_smaller_than_the_float_file[separable-8]",
        "qat/export/onnx/export.py",
        "content = slim(finished).SerializeToString()",
        "import onnx_ir; content = onnx_ir.to_proto(finished).SerializeToString()",
    ),
    Break(
        "parametrized layers crashing or left out",
        "tests/test_layers_computed.py::"
        "test_the_computed_weight_is_quantized_and_conversion_keeps_the_result[weight-norm]",
        "qat/planning/addressable.py",
        "if not is_computed(module) and not isinstance(",
        "if not isinstance(",
        "qat.errors.UserError: Sequential has no layer that can be quantized",
    ),
    Break(
        "pruned layers crashing",
        "tests/test_insert.py::test_what_cannot_be_quantized_stays_float_and_is_audited[pruned]",
        "qat/planning/addressable.py",
        '        return "weight"\n',
        "        return None\n",
    ),
    Break(
        "strict torch.export dropping functional sites",
        f"{KNOWN}a_strict_export_never_drops_functional_sites",
        "qat/layers/sites.py",
        "            with mode:",
        "            if torch.compiler.is_compiling():\n                return super().forward(*args, **kwargs)\n"
        "            with mode:",
    ),
    Break(
        "pickle failing",
        "tests/test_twins.py::test_a_copy_computes_the_same_and_shares_nothing[pickle-training]",
        "qat/layers/twin.py",
        "        return _rebuild, (*_unstack(type(self)),), *rest",
        "        return super().__reduce_ex__(protocol)",
        "_pickle.PicklingError: ",
    ),
]
"""design.md's list: what others get silently wrong."""

BREAKS = [*LIGHTNINGS_CALLBACK, *SILENT]
