"""Parity of schedules, forward process, learning rate, sampler steps and trajectories."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hilbertcell.models import perturbdiff
from hilbertcell.models.perturbdiff import sampling, training

HOST = 1e-12  # float64
NETWORK = 2e-5
TRAJECTORY = 3e-4
SCHEDULES = {
    "linear": perturbdiff.linear_schedule(),
    "cosine": perturbdiff.cosine_schedule(),
    "power_cosine": perturbdiff.power_cosine_schedule(),
    "linear50": perturbdiff.linear_schedule(50),
}
LINEAR_ONLY = [
    "alphas_cumprod_prev", "alphas_cumprod_next", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
    "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    "fixed_large_log_variance",
]  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(golden, name):
    for array in ["betas", "alphas_cumprod", *(LINEAR_ONLY if name == "linear" else [])]:
        golden.check(f"out/sched/{name}/{array}", getattr(SCHEDULES[name], array), HOST)


@pytest.mark.parametrize("case", ["t0", "t1", "t99", "t500", "t999", "batch_t"])
def test_forward_process(golden, case):
    t = golden["in/t"] if case == "batch_t" else np.full(3, int(case[1:]))
    x_t = perturbdiff.diffuse(golden["in/x0"], golden["in/noise"], t, SCHEDULES["linear"])
    assert x_t.dtype == np.float64
    golden.check(f"out/q_sample/{case}", x_t, HOST)


def test_learning_rate(golden):
    with jax.enable_x64(True):
        ratio = training.learning_rate_ratio(jnp.asarray(golden["out/lr/steps"]), 200_000)
    golden.check("out/lr/ratio", ratio, HOST)


@pytest.fixture(scope="module")
def estimate(golden, networks):
    def make(guidance):
        covariates = networks[1](golden["in/cov_pert"], golden["in/cov_celltype"], golden["in/cov_batch"])
        return sampling.guided(networks[0], golden.jax("in/control"), covariates, guidance)

    return make


def one_step(golden, estimate, rule, times):
    """The step of every set at its own time, each by the rule of its own row."""
    results = []
    for i, time in enumerate(times):
        steps = rule(int(time) + 1)
        row = sampling.Steps(*(column[0] for column in steps))
        state = sampling.State(golden.jax("out/step/x_t"), golden.jax("in/selfcond"))
        result = sampling.step(estimate, row, state, golden.jax("in/step_noise"))
        results.append((result.x_t[i], result.previous_x0[i]))
    return (jnp.stack(parts) for parts in zip(*results, strict=True))


def ddim(eta=0.0):
    return lambda start: sampling.ddim_steps(SCHEDULES["linear"], sampling.published_times(start), eta)


def ddpm(start):
    return sampling.ddpm_steps(SCHEDULES["linear"], start)


@pytest.mark.parametrize(
    ("name", "guidance", "rule", "times"),
    [
        ("ddim_w0.0", 0.0, ddim(), None),
        ("ddim_w1.0", 1.0, ddim(), None),
        ("ddim_w2.5", 2.5, ddim(), None),
        ("ddim_eta0.7_w1.0", 1.0, ddim(0.7), None),
        ("ddpm_nw0.5_w1.0", 1.0, ddpm, None),
        ("ddpm_t0_w0.0", 0.0, ddpm, [0, 0, 0]),
        ("ddim_t0_w1.0", 1.0, ddim(), [0, 0, 0]),
    ],
)
def test_one_sampler_step(golden, estimate, name, guidance, rule, times):
    times = golden["in/t"] if times is None else times
    sample, x0 = one_step(golden, estimate(guidance), rule, times)
    golden.check(f"out/step/{name}/sample", sample, NETWORK)
    if f"out/step/{name}/pred_xstart" in golden.arrays:
        golden.check(f"out/step/{name}/pred_xstart", x0, NETWORK)


def trajectory(golden, estimate, steps, noise=None):
    """States after every step, stacked."""

    def body(state, row):
        state = sampling.step(estimate, row, state, noise)
        return state, state

    rows = sampling.Steps(*map(jnp.asarray, (column.astype(np.float32) for column in steps)))
    rows = rows._replace(time=jnp.asarray(steps.time, jnp.int32))
    return jax.lax.scan(body, sampling.init(golden.jax("in/start_noise")), rows)[1]


@pytest.mark.parametrize("guidance", [0.0, 1.0])
@pytest.mark.parametrize("case", ["traj12", "traj50"])
def test_trajectories(golden, estimate, case, guidance):
    schedule, start = (SCHEDULES["linear"], 12) if case == "traj12" else (SCHEDULES["linear50"], 50)
    steps = sampling.ddim_steps(schedule, sampling.published_times(start))
    states = trajectory(golden, estimate(guidance), steps)
    name = f"out/{case}/w{guidance}"
    kept = golden[f"{name}/steps_kept"]
    golden.check(f"{name}/sample", states.x_t[kept], TRAJECTORY)
    if case == "traj12":
        golden.check(f"{name}/pred_xstart", states.previous_x0[kept], TRAJECTORY)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
@pytest.mark.parametrize("case", ["traj12", "traj50"])
def test_ddim_sample(golden, networks, case, guidance):
    covariates = networks[1](golden["in/cov_pert"], golden["in/cov_celltype"], golden["in/cov_batch"])
    start, num_train_steps = (12, 1000) if case == "traj12" else (50, 50)
    cells = perturbdiff.ddim_sample(
        networks[0], golden.jax("in/start_noise"), golden.jax("in/control"), covariates, start, guidance,
        num_train_steps=num_train_steps,
    )  # fmt: skip
    expected = golden[f"out/{case}/w{guidance}/sample"][-1]
    assert np.linalg.norm(cells - expected) <= TRAJECTORY * np.linalg.norm(expected)


def test_ddpm_trajectory_at_fixed_noise(golden, estimate):
    steps = sampling.ddpm_steps(SCHEDULES["linear50"], 50)
    states = trajectory(golden, estimate(1.0), steps, golden.jax("in/step_noise"))
    golden.check("out/traj50/ddpm_w1.0_fixednoise/final", states.x_t[-1], TRAJECTORY)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_number_of_network_evaluations(golden, networks, guidance):
    calls = []

    def counting(x_t, previous_x0, *_, **__):
        calls.append(x_t.shape)
        return jnp.zeros_like(x_t)

    steps = sampling.ddim_steps(SCHEDULES["linear50"], sampling.published_times(50))
    covariates = jnp.zeros((3, 6, 40))
    with jax.disable_jit():
        start_noise = golden.jax("in/start_noise")
        sampling.sample(
            sampling.guided(counting, golden.jax("in/control"), covariates, guidance), steps, start_noise
        )
    assert len(calls) == golden[f"out/traj50/w{guidance}/network_calls"]
