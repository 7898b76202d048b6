import contextlib
import gc
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from e3va_peft.meter import StepReport, live_bytes, measure_step

# Sizes of every test: a batch of 32 rows of 8 features, 16 hidden, 4 out, in float32.
X = 32 * 8 * 4
HIDDEN = 32 * 16 * 4
MLP_PARAMETERS = (8 * 16 + 16 + 16 * 4 + 4) * 4


def batch():
    return torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01)


def measure(model, optimizer=None, x=None, **options):
    """Measure with the sum as loss, which saves nothing for backward."""
    options = {"loss_fn": torch.sum, "repeats": 1, **options}
    return measure_step(model, batch() if x is None else x, optimizer or sgd(model), **options)


class Lambda(nn.Module):
    """One trainable scalar and a function of it, so that a test can say what is saved."""

    def __init__(self, function):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.function = function

    def forward(self, x):
        return self.function(x, self.scale)


class Keep(torch.autograd.Function):
    """Multiply x by scale, and save for backward the tensors that `choose(x)` returns."""

    @staticmethod
    def forward(ctx, x, scale, choose):
        ctx.save_for_backward(*choose(x), scale)
        return x * scale

    @staticmethod
    def backward(ctx, gradient):
        *_, scale = ctx.saved_tensors
        return None, torch.ones_like(scale), None


def keeping(choose):
    return Lambda(lambda x, scale: Keep.apply(x, scale, choose))


# Bytes kept for backward


def test_a_linear_saves_exactly_its_input():
    assert measure(nn.Linear(8, 16)).saved_bytes == X


def test_a_layer_norm_saves_its_input_a_mean_and_a_deviation_per_row():
    assert measure(nn.LayerNorm(8)).saved_bytes == X + 2 * 32 * 4


def test_a_chain_saves_the_input_of_every_part():
    assert measure(mlp()).saved_bytes == X + HIDDEN + HIDDEN


def test_a_custom_function_counts_what_it_saves_in_the_dtype_it_saves_it():
    assert measure(keeping(lambda x: [(x * 16).to(torch.int8)])).saved_bytes == 32 * 8


def test_attention_saves_queries_keys_values_output_and_a_number_per_row():
    def attention(x, scale):
        q, k, v = (x * scale for _ in range(3))  # each saves x, which counts once, to differentiate the product
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    x = torch.randn(2, 3, 16, 8)  # (B, heads, N, D)
    report = measure(Lambda(attention), x=x)
    assert report.saved_bytes == 5 * x.nbytes + 2 * 3 * 16 * 4  # x, q, k, v, output; log-sum-exp in fp32


def test_views_of_one_storage_count_once():
    assert measure(keeping(lambda x: [x[:3], x[3:], x.t()])).saved_bytes == X


def test_a_view_counts_its_storage_whole():
    assert measure(keeping(lambda x: [x[:1]])).saved_bytes == X


def test_parameters_are_excluded():
    # An input that requires a gradient makes every linear save its weight as well.
    assert measure(mlp(), x=batch().requires_grad_()).saved_bytes == X + HIDDEN + HIDDEN


def test_buffers_are_excluded():
    table = torch.ones(32, 8)
    model = Lambda(lambda x, scale: scale * table)
    model.register_buffer("table", table)
    assert measure(model).saved_bytes == 0


def test_a_frozen_linear_saves_nothing_of_its_input():
    model = mlp()
    model[2].requires_grad_(False)
    assert measure(model).saved_bytes == X + HIDDEN  # the inputs of the first linear and of the GELU
    model = mlp()
    model[0].requires_grad_(False)
    assert measure(model).saved_bytes == HIDDEN  # the input of the last linear


def test_a_graph_dropped_during_the_forward_does_not_count():
    def function(x, scale):
        (x.exp() * scale).sum()
        return scale * 1.0

    assert measure(Lambda(function)).saved_bytes == 0


def test_a_checkpointed_chain_saves_only_its_input():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    assert measure(Checkpointed()).saved_bytes == X


def test_autocast_saves_the_low_precision_copy():
    assert measure(nn.Linear(8, 16), autocast_dtype=torch.bfloat16).saved_bytes == X // 2


def test_an_eval_model_is_measured_in_training_mode():
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5)).eval()
    assert measure(model).saved_bytes > X


# The peak


def test_the_peak_of_an_mlp_step_with_sgd():
    report = measure(mlp())
    # The peak is in the backward of the last linear: x, both hidden tensors and the gradient of the second are alive
    # (the first gives way to its own gradient afterwards), the loss and its gradient (4 bytes each), and the gradients
    # of the last weight and bias. The output died with the forward.
    assert report.peak_activations == X + 3 * HIDDEN + 4 + 4
    assert report.peak_gradients == (16 * 4 + 4) * 4
    assert report.peak_parameters == MLP_PARAMETERS
    assert report.peak_optimizer == 0
    assert report.trainable_parameters == MLP_PARAMETERS // 4


def test_adamw_adds_two_moments_and_a_counter_per_parameter():
    model = mlp()
    plain = measure(model)
    report = measure(model, torch.optim.AdamW(model.parameters()))
    assert report.peak_optimizer == 2 * MLP_PARAMETERS + 4 * 4
    assert report.peak_bytes == plain.peak_bytes + report.peak_optimizer


def test_the_first_adamw_step_costs_what_the_later_ones_cost():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    first = measure(model, optimizer)
    model(batch()).sum().backward()
    optimizer.step()
    assert memory(measure(model, optimizer)) == memory(first)


def test_a_temporary_of_the_optimizer_can_be_the_peak():
    class Plain(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        @torch.no_grad()
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(parameter.grad * -0.01)

    model = nn.Linear(64, 64, bias=False)
    report = measure(model, Plain(model.parameters()), x=torch.randn(1, 64))
    # In the optimizer step the batch, the loss and the temporary are alive.
    assert report.peak_activations == 64 * 4 + 4 + 64 * 64 * 4
    assert report.peak_gradients == report.peak_parameters == 64 * 64 * 4


def test_behind_a_frozen_linear_the_peak_is_in_the_forward():
    model = mlp()
    model[0].requires_grad_(False)
    report = measure(model)
    # Input and output of the GELU; its input dies next, because nothing needs it for backward.
    assert report.peak_activations == X + 2 * HIDDEN
    assert report.peak_gradients == 0
    assert report.peak_parameters == MLP_PARAMETERS
    assert report.trainable_parameters == 16 * 4 + 4


def test_tied_parameters_count_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight.data = model[0].weight.data  # two parameters, one storage
    assert measure(model).peak_parameters == 8 * 8 * 4
    model[1].weight = model[0].weight  # one parameter, used twice
    assert measure(model).peak_parameters == 8 * 8 * 4


def test_buffers_count_as_parameters():
    model = nn.BatchNorm1d(8)
    # Weight, bias, running mean and running variance in float32, and a counter in int64.
    assert measure(model).peak_parameters == 4 * 8 * 4 + 8


def test_the_batch_counts_even_where_it_is_not_used():
    model = Lambda(lambda x, scale: scale * 1.0)
    used, unused = measure(model, x=torch.zeros(0)), measure(model)
    assert unused.peak_activations == used.peak_activations + X


def test_a_tensor_kept_by_the_loss_counts_once_it_is_used():
    model, target = nn.Linear(8, 8), torch.zeros(32, 8)
    report = measure(model, loss_fn=lambda outputs: (outputs - target).sum())
    # At the end of the forward: the batch, the output, the target, their difference and the loss.
    assert report.peak_activations == 4 * X + 4


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_the_split_sums_to_the_peak(optimizer):
    model = nn.Sequential(mlp(), nn.BatchNorm1d(4))
    report = measure(model, optimizer(model.parameters(), lr=0.01))
    parts = (report.peak_parameters, report.peak_gradients, report.peak_optimizer, report.peak_activations)
    assert sum(parts) == report.peak_bytes


def test_a_model_on_meta_costs_the_same_bytes():
    real, meta = mlp(), mlp().to("meta")
    expected = measure(real, torch.optim.AdamW(real.parameters()))
    report = measure(meta, torch.optim.AdamW(meta.parameters()), x=batch().to("meta"))
    assert memory(report) == memory(expected)


def memory(report):
    return {key: value for key, value in report.to_dict().items() if not key.endswith("_ms")}


def test_the_same_bytes_come_out_twice():
    class RandomDepth(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))

        def forward(self, x):
            for layer in self.layers:
                x = torch.nn.functional.dropout(layer(x)) if torch.rand(()) < 0.5 else x + self.layers[0](x)
            return x

    model = RandomDepth()
    optimizer = torch.optim.AdamW(model.parameters())
    assert memory(measure(model, optimizer)) == memory(measure(model, optimizer))


@pytest.mark.parametrize("threshold", [1, 10_000_000])
def test_the_garbage_collector_does_not_change_the_peak(threshold):
    def leak(tensor):
        cycle = [tensor]
        cycle.append(cycle)

    def function(x, scale):
        for _ in range(10):
            leak(x * 2)
        return scale * 1.0

    before = gc.get_threshold()
    gc.set_threshold(threshold)
    try:
        report = measure(Lambda(function))
    finally:
        gc.set_threshold(*before)
    # The batch, ten products that nobody reaches any more, the scaled scalar and its sum.
    assert report.peak_activations == 11 * X + 4 + 4


@pytest.mark.slow
def test_the_peak_agrees_with_the_growth_of_the_process():
    code = """
import psutil, torch
from torch import nn
from e3va_peft.meter import measure_step
torch.set_num_threads(1)
def highest():  # getrusage's would begin at that of the process that started this one
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
def build(device):
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.GELU()))).to(device)
    return model, torch.optim.SGD(model.parameters(), lr=0.01)
def loss_fn(y):
    return y.square().mean()
def step(x):
    loss_fn(model(x)).backward()
    optimizer.step()
    optimizer.zero_grad()
model, optimizer = build("meta")
x = torch.randn(20_000, 256)
peak = measure_step(model, x.to("meta"), optimizer, loss_fn=loss_fn, repeats=1)
model, optimizer = build("cpu")
step(torch.randn(64, 256))  # the libraries and buffers that come with a first step
before = psutil.Process().memory_info().rss
step(x)
print(peak.peak_activations - x.nbytes, highest() - before)
"""
    # Every buffer of its own pages, so that what is freed goes back at once and nothing free is handed out again.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    counted, grown = map(int, done.stdout.split())
    assert counted > 200 * 2**20
    assert grown == pytest.approx(counted, rel=0.1)


# Nothing is changed by measuring


def state_of(model, optimizer):
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    return {
        "objects": [id(tensor) for tensor in tensors],
        "values": [tensor.tolist() for tensor in tensors],
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(p._post_accumulate_grad_hooks or {}) for p in model.parameters()],
        "options": [[group[key] for key in sorted(group) if key != "params"] for group in optimizer.param_groups],
        "random": torch.get_rng_state().tolist(),
        "collector": gc.isenabled(),
    }


def used_model():
    """A model in the middle of training: some gradients, some state, mixed modes."""
    gc.enable()
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
    model.register_buffer("expanded", torch.zeros(1).expand(5))  # cannot be written in place
    optimizer = torch.optim.AdamW(model.parameters())
    model(batch()).sum().backward()
    optimizer.step()
    model[3].weight.grad = None
    model[1].eval()
    return model, optimizer


def test_nothing_is_changed_by_measuring():
    model, optimizer = used_model()
    before = state_of(model, optimizer)
    measure(model, optimizer, repeats=3, warmup=2)
    assert state_of(model, optimizer) == before


def test_a_fresh_optimizer_is_fresh_again():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    measure(model, optimizer)
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("failing_call", range(5))
def test_nothing_is_changed_by_an_exception(failing_call):
    # The forwards are: check, warm-up, bytes saved, peak, time.
    model, optimizer = used_model()
    calls = iter(range(5))

    def loss_fn(outputs):
        if next(calls) == failing_call:
            raise RuntimeError("out of memory, say")
        return outputs.sum()

    before = state_of(model, optimizer)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        measure(model, optimizer, loss_fn=loss_fn)
    assert state_of(model, optimizer) == before


def test_a_buffer_replaced_during_the_forward_is_put_back():
    def function(x, scale):
        model.count = model.count + 1
        return x * scale

    model: Any = Lambda(function)
    model.register_buffer("count", torch.zeros(()))
    count = model.count
    measure(model)
    assert model.count is count
    assert count == 0


def test_no_gradient_lands_on_the_batch():
    x = batch().requires_grad_()
    measure(mlp(), x=x)
    assert x.grad is None


# What goes in and what comes out


@pytest.mark.parametrize("outputs", [lambda loss: {"loss": loss}, lambda loss: SimpleNamespace(loss=loss)])
def test_a_mapping_is_passed_as_keywords_and_the_loss_is_found(outputs):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 16)

        def forward(self, *, pixels, labels):
            return outputs((self.linear(pixels) * labels).sum())

    report = measure(Model(), x={"pixels": batch(), "labels": torch.ones(32, 1)}, loss_fn=None)
    assert report.saved_bytes == X + 32 * 4


def test_a_tuple_is_passed_by_position():
    model = nn.Bilinear(8, 8, 1)
    assert measure(model, x=(batch(), batch())).saved_bytes == 2 * X


def test_the_report_reads_in_mib_and_ms():
    report = StepReport(3 * 2**20, 10 * 2**20, 4 * 2**20, 1 * 2**20, 2 * 2**20, 3 * 2**20, 1234, 1.0, 2.5, 0.25)
    assert report.step_ms == 3.75
    assert report.to_dict()["step_ms"] == 3.75
    assert report.to_dict()["saved_bytes"] == 3 * 2**20
    assert str(report) == (
        "saved for backward        3.00 MiB\n"
        "peak of a step           10.00 MiB"
        " = 4.00 parameters + 1.00 gradients + 2.00 optimizer + 3.00 activations\n"
        "time of a step            3.75 ms  = 1.00 forward + 2.50 backward + 0.25 optimizer\n"
        "trainable                1,234 parameters"
    )


def test_the_peak_of_inference_is_its_widest_moment_beyond_the_weights():
    x = batch()
    model = mlp()
    with torch.no_grad():
        alive = live_bytes(lambda: model(x), model)
    assert max(alive) == X + 2 * HIDDEN  # the batch, the hidden layer, and it again behind GELU


def test_live_bytes_rise_in_forward_and_fall_in_backward():
    x, model = batch(), mlp()
    alive = live_bytes(lambda: model(x).sum().backward(), model)
    kept = X + 2 * HIDDEN + 32 * 4 * 4 + 4  # the batch, the hidden layer twice, the output and its sum
    assert kept in alive and alive[-1] < kept
    assert alive.index(max(alive)) > alive.index(kept)


def test_cuda_reports_its_own_peak_of_the_timed_steps(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: calls.append("read") or 12345678)
    monkeypatch.setattr("e3va_peft.meter.step._cuda_devices", lambda parameters: {torch.device("cuda", 0)})
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    report = measure(mlp())
    assert report.cuda_peak_bytes == 12345678 and calls == ["reset", "read"]
    assert "CUDA's own peak          11.77 MiB" in str(report)
    monkeypatch.undo()
    assert measure(mlp()).cuda_peak_bytes is None


def test_every_part_of_the_step_is_timed():
    report = measure(mlp(), repeats=3)
    assert min(report.forward_ms, report.backward_ms, report.optimizer_ms) > 0


# Errors


@pytest.mark.parametrize("name", ["repeats", "warmup"])
def test_fewer_than_one_repetition_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} .*got 0"):
        measure(mlp(), **{name: 0})


def test_a_list_as_batch_is_refused():
    with pytest.raises(TypeError, match=r"batch .* list: .*tuple\(batch\)"):
        measure(mlp(), x=[batch()])


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match=r"model \(Linear\)"):
        measure(nn.Linear(8, 16).requires_grad_(False))


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"optimizer \(SGD\) .*4"):
        measure(mlp(), sgd(mlp()))


@pytest.mark.parametrize("output, found", [(torch.zeros(1), "Tensor"), ({"logits": torch.zeros(1)}, r"\['logits'\]")])
def test_outputs_without_a_loss_are_refused(output, found):
    with pytest.raises(ValueError, match=f"{found}.*loss_fn"):
        measure(Lambda(lambda x, scale: output), loss_fn=None)


@pytest.mark.parametrize(
    "loss_fn, error, message",
    [
        (lambda outputs: 1.0, TypeError, "loss .*float"),
        (lambda outputs: outputs, ValueError, r"loss .*\(32, 4\)"),
        (lambda outputs: outputs.sum().detach(), ValueError, "loss .*parameter"),
        (lambda outputs: outputs.sum() * float("nan"), ValueError, "loss .*nan"),
    ],
)
def test_a_loss_that_cannot_train_is_refused(loss_fn, error, message):
    with pytest.raises(error, match=message):
        measure(mlp(), loss_fn=loss_fn)
