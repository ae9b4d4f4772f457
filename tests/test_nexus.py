"""The facts about the update, on a smooth problem and through NexusTrainer on a tiny Llama, and the window itself."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_nexus import Nexus
from tests.support.smooth_problem import GAMMA, Problem, flat, mean_along_path, pseudo_gradient
from tests.support.tiny import Rows, tiny_llama


class TestAlgebra:
    def test_definition_p_averages_directions_along_the_path(self):
        problem = Problem()
        for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
            torch.testing.assert_close(pseudo_gradient(problem, order), mean_along_path(problem, order, GAMMA))
        one_way, other_way = (mean_along_path(problem, order, GAMMA) for order in ([0, 1, 2, 3], [3, 1, 0, 2]))
        assert not torch.allclose(one_way, other_way)

    def test_fact_1_norm_at_most_one_so_clipping_is_harmless(self):
        p = pseudo_gradient(Problem(), [0, 1, 2, 3])
        assert 0 < p.norm() < 1
        params = [nn.Parameter(torch.zeros(1000))]
        nexus = Nexus(params, GAMMA)
        with nexus.window():  # with a linear loss all directions are equal
            for _ in range(4):
                (params[0] * torch.arange(1.0, 1001)).sum().backward()
                nexus.inner_step()
        before = params[0].grad.clone()
        assert before.norm() == pytest.approx(1, abs=1e-4)
        nn.utils.clip_grad_norm_(params, 1.0)
        assert (params[0].grad - before).norm() / before.norm() < 1e-4

    @pytest.mark.parametrize("around", ["window", "windows"])
    def test_an_autocast_around_several_steps_sees_their_moves(self, around):
        def pseudo_gradients(outside: bool) -> list[torch.Tensor]:
            torch.manual_seed(0)
            layer, found = nn.Linear(8, 8), []
            nexus, rows = Nexus(layer.parameters(), GAMMA), torch.randn(4, 3, 8)
            with torch.autocast("cpu", torch.bfloat16, enabled=outside):
                for _ in range(2):
                    with nexus.window():
                        for x in rows:
                            with torch.autocast("cpu", torch.bfloat16):
                                loss = layer(x).square().sum()
                            loss.backward()
                            nexus.inner_step()
                    found.append(torch.cat([p.grad.flatten() for p in layer.parameters()]))
            return found

        apart, together = pseudo_gradients(False), pseudo_gradients(True)
        index = {"window": 0, "windows": 1}[around]
        torch.testing.assert_close(together[index], apart[index])

    @pytest.mark.parametrize("scale", [1e-6, 1e6])
    def test_fact_2_loss_scale_does_not_matter_nor_for_k_1(self, scale):
        problem = Problem()
        torch.testing.assert_close(
            pseudo_gradient(problem, [0, 1, 2, 3], scale=scale), pseudo_gradient(problem, [0, 1, 2, 3])
        )
        g = problem.gradient(2, problem.start)
        torch.testing.assert_close(pseudo_gradient(problem, [2], scale=scale), g / g.norm())

    def test_fact_3_path_cosine_is_the_mean_pairwise_cosine(self):
        problem, params = Problem(), Problem().params()
        nexus, directions = Nexus(params, GAMMA), []
        with nexus.window():
            for m in range(4):
                problem.loss(m, params).backward()
                g = flat([p.grad for p in params])
                directions.append(g / g.norm())
                nexus.inner_step()
        cosines = [directions[i] @ directions[j] for i in range(4) for j in range(i)]
        assert nexus.path_cosine == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-9)

    def test_fact_4_taylor_remainder_is_second_order(self):
        problem, k = Problem(), 4
        d, j = [], []
        for m in range(k):
            g = problem.gradient(m, problem.start)
            d.append(g / g.norm())
            projection = torch.eye(problem.size, dtype=torch.float64) - torch.outer(d[m], d[m])
            j.append(projection @ problem.hessian(m, problem.start) / g.norm())
        first_order = sum(j[m] @ d[i] for m in range(k) for i in range(m))

        def remainder(gamma: float) -> float:
            expected = (sum(d) - gamma * first_order) / k
            return float((pseudo_gradient(problem, [0, 1, 2, 3], gamma) - expected).norm())

        for gamma in (0.02, 0.01):
            assert remainder(gamma) / remainder(gamma / 2) == pytest.approx(4, rel=0.1)
        transposed = sum(j[m].T @ d[i] for m in range(k) for i in range(m))
        assert (transposed - first_order).norm() > 0.01 * first_order.norm()  # the test can tell J from its transpose

    def test_fact_5_gamma_zero_averages_directions_at_theta_0(self):
        problem = Problem()
        gradients = [problem.gradient(m, problem.start) for m in range(4)]
        torch.testing.assert_close(
            pseudo_gradient(problem, [0, 1, 2, 3], gamma=0.0), sum(g / g.norm() for g in gradients) / 4
        )

    def test_fact_6_without_a_window_nothing_is_touched(self):
        problem, params = Problem(), Problem().params()
        Nexus(params, GAMMA)
        problem.loss(0, params).backward()
        torch.testing.assert_close(flat([p.grad for p in params]), problem.gradient(0, problem.start))
        assert torch.equal(flat(params), problem.start)

    def test_fact_7_ranks_with_shared_gradients_match_one_process(self):
        problem = Problem(8)
        ranks = [problem.params(), problem.params()]
        walkers = [Nexus(params, GAMMA) for params in ranks]
        with walkers[0].window(), walkers[1].window():
            for m in range(4):  # each rank has half of a micro-batch, and the reduction averages the halves
                for r, params in enumerate(ranks):
                    problem.loss(2 * m + r, params).backward()
                for a, b in zip(*ranks, strict=True):
                    a.grad = b.grad = (a.grad + b.grad) / 2
                    a.grad = a.grad.clone()
                for walker in walkers:
                    walker.inner_step()
        one, params = Nexus(problem.params(), GAMMA), None
        params = one.params
        with one.window():
            for m in range(4):
                ((problem.loss(2 * m, params) + problem.loss(2 * m + 1, params)) / 2).backward()
                one.inner_step()
        first, second = (flat([p.grad for p in r]) for r in ranks)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, flat([p.grad for p in params]))

    def test_fact_8_the_path_loss_falls_with_the_alignment(self):
        problem, gamma = Problem(), 1e-4
        params = problem.params()
        nexus, path = Nexus(params, gamma), []
        with nexus.window():
            for m in range(4):
                loss = problem.loss(m, params)
                path.append(float(loss.detach()))
                loss.backward()
                nexus.inner_step()
        at_start = [float(problem.loss(m, [problem.start])) for m in range(4)]
        g = [problem.gradient(m, problem.start) for m in range(4)]
        predicted = gamma * sum(float(g[m] @ (g[i] / g[i].norm())) for m in range(4) for i in range(m))
        assert sum(at_start) - sum(path) == pytest.approx(predicted, rel=1e-2)
        assert predicted != 0


# ---- The same facts through NexusTrainer ----


class Capture(TrainerCallback):
    """Keep the pseudo-gradient and the weights of each outer step."""

    def __init__(self):
        self.pseudo, self.norms, self.weights = [], [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append(flat(list(model.parameters())))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.pseudo.append(flat([p.grad for p in model.parameters()]))
        self.weights_before_step = flat(list(model.parameters()))


def same_batches(model, rows, batch=2, k=4):
    """Gradients and losses of the first k micro-batches of rows at the current weights."""
    gradients, losses = [], []
    for m in range(k):
        ids = rows.ids[m * batch : (m + 1) * batch]
        loss = model(input_ids=ids, labels=rows.labels[m * batch : (m + 1) * batch]).loss
        gradients.append(flat(list(torch.autograd.grad(loss, list(model.parameters())))))
        losses.append(float(loss.detach()))
    return gradients, losses


@pytest.fixture
def step(make_trainer):
    """Run one outer step through NexusTrainer in float64 over known micro-batches, and return the capture."""

    def run(gamma=GAMMA, scale=None, k=4, **config):
        capture = Capture()
        model = tiny_llama(dtype=torch.float64)

        def loss_func(outputs, labels, num_items_in_batch=None):
            return scale * model.loss_function(outputs.logits, labels, model.config.vocab_size)

        kwargs = {"callbacks": [capture]} | ({"compute_loss_func": loss_func} if scale else {})
        defaults = {"max_grad_norm": 0.0, "max_steps": 1, "train_sampling_strategy": "sequential"}
        trainer = make_trainer(
            Rows(2 * k, 3), model, kwargs, inner_lr=gamma, gradient_accumulation_steps=k, **(defaults | config)
        )
        trainer.train()
        capture.logs = next(entry for entry in trainer.state.log_history if "loss" in entry)
        return capture

    return run


class TestThroughTrainer:
    def test_definition_and_restore(self, step):
        captured, model, rows = step(), tiny_llama(dtype=torch.float64), Rows(8, 3)
        start = flat(list(model.parameters()))
        assert torch.equal(captured.weights_before_step, start)
        total = torch.zeros_like(start)
        for m in range(4):  # the path, computed by moving the weights of a second model
            g = same_batches(model, rows)[0][m]
            total += g / g.norm()
            nn.utils.vector_to_parameters(flat(list(model.parameters())) - GAMMA * g / g.norm(), model.parameters())
        torch.testing.assert_close(captured.pseudo[0], total / 4)

    def test_fact_1_norm_at_most_one_so_clipping_is_harmless(self, step):
        free, clipped = step(max_grad_norm=0.0), step(max_grad_norm=1.0)
        assert 0 < free.pseudo[0].norm() < 1
        assert torch.equal(free.pseudo[0], clipped.pseudo[0])

    def test_fact_2_loss_scale_does_not_matter_nor_for_k_1(self, step):
        torch.testing.assert_close(step(scale=1e-3).pseudo[0], step(scale=1e3).pseudo[0])
        gradient = same_batches(tiny_llama(dtype=torch.float64), Rows(2, 3), k=1)[0][0]
        torch.testing.assert_close(step(k=1).pseudo[0], gradient / gradient.norm())

    def test_fact_3_path_cosine_is_logged(self, step):
        captured = step(gamma=0.0)
        g = same_batches(tiny_llama(dtype=torch.float64), Rows(8, 3))[0]
        cosines = [torch.cosine_similarity(g[i], g[j], dim=0) for i in range(4) for j in range(i)]
        assert captured.logs["path_cosine"] == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-6)
        assert captured.logs["pseudo_gradient_norm"] == pytest.approx(float(captured.pseudo[0].norm()), rel=1e-6)

    def test_fact_4_taylor_remainder_is_second_order(self, step):
        model, rows = tiny_llama(dtype=torch.float64), Rows(8, 3)
        params = list(model.parameters())
        d, norms = [], []
        for g in same_batches(model, rows)[0]:
            norms.append(g.norm())
            d.append(g / g.norm())
        first_order = torch.zeros_like(d[0])
        for m in range(4):
            if m == 0:
                continue
            loss = model(input_ids=rows.ids[2 * m : 2 * m + 2], labels=rows.labels[2 * m : 2 * m + 2]).loss
            g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(loss, params, create_graph=True)])
            hd = flat(list(torch.autograd.grad(g @ sum(d[:m]), params)))  # H_m applied to the earlier directions
            first_order += (hd - d[m] * (d[m] @ hd)) / norms[m]

        def remainder(gamma):
            return float((step(gamma=gamma).pseudo[0] - (sum(d) - gamma * first_order) / 4).norm())

        assert remainder(2e-3) / remainder(1e-3) == pytest.approx(4, rel=0.15)

    def test_fact_5_gamma_zero_averages_directions_at_theta_0(self, step):
        g = same_batches(tiny_llama(dtype=torch.float64), Rows(8, 3))[0]
        torch.testing.assert_close(step(gamma=0.0).pseudo[0], sum(x / x.norm() for x in g) / 4)

    def test_fact_6_switched_off_it_is_the_trainer_bit_for_bit(self, make_trainer, tmp_path):
        ours = make_trainer(Rows(40, 1, pad=True), nexus=False, max_steps=7, weight_decay=0.1)
        stock_args = {k: v for k, v in ours.args.to_dict().items() if k in TrainingArguments.__dataclass_fields__}
        stock_args = TrainingArguments(
            **{**stock_args, "output_dir": str(tmp_path / "stock"), "accelerator_config": None}
        )
        stock = Trainer(model=tiny_llama(), args=stock_args, train_dataset=Rows(40, 1, pad=True))
        assert ours.train().training_loss == stock.train().training_loss
        assert torch.equal(flat(list(ours.model.parameters())), flat(list(stock.model.parameters())))

    def test_fact_7_weights_between_steps_are_the_optimizers_alone(self, step):
        """Fact 7 for one process. tests/trainer/distributed tests it on several ranks."""
        captured = step(max_steps=3, learning_rate=0.0)
        assert all(torch.equal(w, captured.weights[0]) for w in captured.weights)
        assert len(captured.weights) == 3

    def test_fact_8_the_logged_loss_is_the_path_loss(self, step):
        model, rows, gamma = tiny_llama(dtype=torch.float64), Rows(8, 3), 1e-3
        g, at_start = same_batches(model, rows)
        captured = step(gamma=gamma)
        lowered = gamma * sum(float(g[m] @ g[i] / g[i].norm()) for m in range(4) for i in range(m)) / 4
        assert captured.logs["loss"] == pytest.approx(sum(at_start) / 4 - lowered, abs=abs(lowered) * 0.05)
        assert abs(lowered) > 1e-5


# ---- The window ----


@pytest.fixture
def two_ranks():
    """A mesh of this process and one that does not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


class TestWindow:
    @pytest.mark.parametrize("direction", ["gradient", "random"])
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("at", [0, 1, 3])
    def test_an_exception_restores_and_leaves_no_gradient(self, direction, error, at):
        problem, params = Problem(), Problem().params()
        nexus = Nexus(params, GAMMA, direction=direction)
        with pytest.raises(error), nexus.window():
            for m in range(4):
                problem.loss(m, params).backward()
                if m == at:
                    raise error
                nexus.inner_step()
        assert torch.equal(flat(params), problem.start)
        assert all(p.grad is None for p in params)

    def test_a_second_interrupt_in_the_restore(self, monkeypatch):
        problem, params = Problem(), Problem().params()
        nexus = Nexus(params, GAMMA)
        copy, calls = torch._foreach_copy_, []

        def interrupted(targets, values, **kwargs):
            calls.append(len(targets))
            if len(calls) == 1:  # half of the parameters are back, then Ctrl-C
                copy(targets[:1], values[:1])
                raise KeyboardInterrupt
            copy(targets, values, **kwargs)

        with pytest.raises(KeyboardInterrupt), nexus.window():
            problem.loss(0, params).backward()
            nexus.inner_step()
            assert not torch.equal(flat(params), problem.start)
            monkeypatch.setattr(torch, "_foreach_copy_", interrupted)
            raise KeyboardInterrupt
        assert len(calls) == 2
        assert torch.equal(flat(params), problem.start)

    def test_an_interrupted_snapshot_is_not_restored(self, monkeypatch):
        problem, params = Problem(), Problem().params()
        nexus = Nexus(params, GAMMA)
        copy, calls = torch._foreach_copy_, []

        def interrupted(*args, **kwargs):  # only the copy into the snapshot
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return copy(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "_foreach_copy_", interrupted)
            with pytest.raises(KeyboardInterrupt), nexus.window():
                pytest.fail("the window was entered")
        assert torch.equal(flat(params), problem.start)
        with nexus.window():  # and it can be used again
            problem.loss(0, params).backward()
            nexus.inner_step()
        assert torch.equal(flat(params), problem.start)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
    def test_an_unusable_inner_step_is_skipped_and_not_in_k(self, bad):
        problem, params = Problem(), Problem().params()
        nexus = Nexus(params, GAMMA)
        with nexus.window():
            for m in [0, 1, 2]:
                problem.loss(m, params).backward()
                if m == 1:
                    for p in params:
                        p.grad.fill_(bad)
                nexus.inner_step()
        assert nexus.taken == [True, False, True]
        torch.testing.assert_close(flat([p.grad for p in params]), mean_along_path(problem, [0, 2], GAMMA))

    @pytest.mark.parametrize("gamma", [0.0, GAMMA])
    def test_without_usable_steps_there_is_no_gradient(self, gamma):
        params = Problem().params()
        nexus = Nexus(params, gamma)
        with nexus.window():
            for p in params:
                p.grad = torch.full_like(p, math.nan)
            nexus.inner_step()
        assert nexus.steps_taken == 0
        assert all(p.grad is None for p in params)
        assert math.isnan(nexus.path_cosine)

    def test_a_parameter_without_gradients_gets_none(self):
        unused, skipped, used = (nn.Parameter(torch.ones(3)) for _ in range(3))
        nexus = Nexus([unused, skipped, used], GAMMA)
        with nexus.window():
            (skipped * math.nan).sum().backward()
            nexus.inner_step()
            used.square().sum().backward()
            nexus.inner_step()
        assert unused.grad is None and skipped.grad is None
        torch.testing.assert_close(used.grad, torch.full((3,), 3**-0.5), rtol=1e-5, atol=0)

    def test_gradients_from_before_the_window_are_cleared(self):
        problem, params = Problem(), Problem().params()
        problem.loss(3, params).backward()
        nexus = Nexus(params, GAMMA)
        with nexus.window():
            problem.loss(0, params).backward()
            nexus.inner_step()
        torch.testing.assert_close(flat([p.grad for p in params]), mean_along_path(problem, [0], GAMMA))

    def test_layouts_may_differ_between_weights_and_gradients(self):
        weight = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
        gradient = torch.randn(3, 5, dtype=torch.float64).t()
        nexus = Nexus([weight], GAMMA)
        with nexus.window():
            weight.grad = gradient.clone(memory_format=torch.preserve_format)
            assert weight.grad.stride() != weight.stride()
            nexus.inner_step()
        torch.testing.assert_close(weight.grad, gradient / gradient.norm())

    def test_the_snapshot_is_allocated_once(self):
        problem, params = Problem(), Problem().params()
        nexus = Nexus(params, GAMMA)
        pointers = []
        for _ in range(2):
            with nexus.window():
                problem.loss(0, params).backward()
                nexus.inner_step()
            pointers.append([t.data_ptr() for t in nexus._snapshot.values])
        assert pointers[0] == pointers[1]

    def test_misuse_is_an_error(self):
        params = Problem().params()
        nexus = Nexus(params, GAMMA)
        with pytest.raises(RuntimeError, match="outside"):
            nexus.inner_step()
        with nexus.window():
            with pytest.raises(RuntimeError, match=r"loss\.backward"):
                nexus.inner_step()
            with pytest.raises(RuntimeError, match="nested"), nexus.window():
                pass
        with pytest.raises(ValueError, match="inner_lr=-1"):
            Nexus(params, -1)
        with pytest.raises(ValueError, match="direction='sideways'"):
            Nexus(params, direction="sideways")
        with pytest.raises(ValueError, match="no parameters"):
            Nexus([])
        with pytest.raises(ValueError, match="bfloat16"):
            Nexus([nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))])

    def test_sharded_parameters_need_a_norm_over_all_shards(self, two_ranks):
        def param(*placements):
            local = DTensor.from_local(torch.ones(2, 4), two_ranks, placements, run_check=False)
            return nn.Parameter(local)

        plain = nn.Parameter(torch.ones(3))
        Nexus([plain, param(Replicate())])
        with pytest.raises(ValueError, match=r"sharded parameter of shape \(4, 4\).*Pass norm=.*NexusTrainer"):
            Nexus([plain, param(Shard(0))])
        nexus = Nexus([plain, param(Shard(0))], norm=lambda indices, gradients: torch.tensor(2.0))
        with nexus.window():
            nexus.params[0].sum().backward()
            assert nexus.inner_step() == 2
