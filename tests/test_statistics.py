"""Means, intervals, paired differences, how often they err, and the seeds needed: against SciPy, brute force and simulation"""
import math

import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from fastkdtf.lab.statistics import (Score, counted_images, holm, mean_sd, number_or_nan, paired_difference, paired_p, seeds_needed, seeds_to_show, t_interval,
                                     verdict, welch_interval)

few = settings(max_examples=60, deadline=None)


@pytest.mark.parametrize('higher,good,bad', [(True, .9, .8), (False, .1, .2)])
def test_a_score_knows_the_better_of_two_and_not_a_number_is_never_better(higher, good, bad):
    score = Score('x', higher)
    assert score.better(good, bad) and not score.better(bad, good) and not score.better(good, good) and score.sign*(good-bad) > 0
    assert score.better(bad, score.worst) and not score.better(math.nan, bad) and not score.better(math.nan, score.worst)


# ---------------------------------------------------------------- paired differences

numbers = st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=2, max_size=12)

@few
@given(numbers, st.sampled_from([.5, .9, .95, .99]))
def test_paired_difference_is_scipys(pairs, confidence):
    a,b = np.array(pairs).T
    mean,low,high = paired_difference(a, b, confidence)
    assert mean == pytest.approx((a-b).mean(), abs=1e-12)
    if (a-b).std() < 1e-6: return   # SciPy warns there
    interval = stats.ttest_rel(a, b).confidence_interval(confidence)
    assert (low, high) == pytest.approx((interval.low, interval.high), rel=1e-9, abs=1e-9)

def test_paired_difference_of_few():
    assert paired_difference([.9], [.8])[0] == pytest.approx(.1)
    assert all(math.isnan(o) for o in paired_difference([.9], [.8])[1:])

def test_equal_differences_have_an_interval_of_some_width():
    "A fifth of an image, of as many as the accuracies can be shares of, a hundred at least"
    half = stats.t.ppf(.975, 1)*.2/100/math.sqrt(2)
    assert paired_difference([.9, .8], [.8, .7]) == pytest.approx((.1, .1-half, .1+half))
    assert paired_difference([.9, .8], [.8, .7], n_images=1000) == pytest.approx((.1, .1-half/10, .1+half/10))
    base = np.float32(np.array([330, 335])/360).tolist()   # as `evaluate` returns them
    for gain,said in ((1, 'open'), (2, 'ahead'), (-1, 'open'), (-2, 'behind'), (0, 'open')):
        ours = np.float32(np.array([330+gain, 335+gain])/360).tolist()
        assert verdict(paired_difference(ours, base)) == said
        assert (paired_p(ours, base) < .05) == (said != 'open')


@few
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12), st.sampled_from([.5, .9, .95, .99]))
def test_mean_spread_and_interval_are_those_of_0_1_0(values, confidence):
    "The formulas as they stood there, to 1e-9"
    mean,sd = mean_sd(values)
    assert (mean, sd) == (pytest.approx(np.mean(values), abs=1e-9), pytest.approx(np.std(values, ddof=1), abs=1e-9))
    half = float(stats.t.ppf((1+confidence)/2, len(values)-1))*sd/math.sqrt(len(values))
    assert t_interval(mean, sd, len(values), confidence) == pytest.approx((mean-half, mean+half), rel=1e-9, abs=1e-9)
    if sd < 1e-6: return   # of equal differences below
    assert paired_difference(values, np.zeros(len(values)), confidence) == pytest.approx((mean, mean-half, mean+half), rel=1e-9, abs=1e-9)

def test_too_few_values():
    assert all(map(math.isnan, (*mean_sd([]), mean_sd([1.])[1], *paired_difference([], [])))) and mean_sd([1.])[0] == 1.
    assert t_interval(1., 0., 3) == (1., 1.) and all(map(math.isnan, t_interval(1., 0., 1)))
    assert all(map(math.isnan, map(number_or_nan, (None, '', 'nan', math.inf, -math.inf)))) and number_or_nan('2.5') == 2.5

def test_verdict():
    differences = [(1., .1, 2.), (-1., -2., -.1), (1., -.1, 2.), (1., 0., 2.), (1., math.nan, math.nan)]
    assert [verdict(o) for o in differences] == ['ahead', 'behind', 'open', 'open', 'open']


@few
@given(st.lists(st.floats(60, 80), min_size=2, max_size=6), st.lists(st.floats(60, 80), min_size=2, max_size=6))
def test_welchs_interval_is_scipys(a, b):
    if np.std(a) < 1e-3 or np.std(b) < 1e-3: return
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(.95)
    found = welch_interval(np.mean(a), np.std(a, ddof=1), len(a), np.mean(b), np.std(b, ddof=1), len(b))
    assert found == pytest.approx((np.mean(a)-np.mean(b), expected.low, expected.high), rel=1e-6, abs=1e-9)

def test_welchs_interval_is_not_known_without_spreads_and_runs():
    for given_ in ((1., math.nan, 3, 2., .1, 3), (1., .1, 1, 2., .1, 3), (1., .1, 3, 2., .1, math.nan)):
        difference,*ends = welch_interval(*given_)
        assert difference == -1. and all(map(math.isnan, ends))
    assert welch_interval(1., 0., 3, 2., 0., 3) == (-1., -1., -1.)


# ---------------------------------------------------------------- seeds needed

def power_of(n, effect, level=.05):
    "Of the two-sided paired t-test, both tails, by integrating over the distribution of the sample's sd"
    t = stats.t.ppf(1-level/2, n-1)
    q = (np.arange(20_000)+.5)/20_000
    s = np.sqrt(stats.chi2.ppf(q, n-1)/(n-1))   # sd of the sample over the true one
    return (stats.norm.sf(t*s - effect*math.sqrt(n)) + stats.norm.cdf(-t*s - effect*math.sqrt(n))).mean()

def with_effect(effect, n=4):
    "Differences whose mean is `effect` of their sd"
    d = np.arange(n) - (n-1)/2
    return effect + d/d.std(ddof=1)

@pytest.mark.parametrize('effect,level,power', [(.3, .05, .8), (.5, .05, .8), (.8, .05, .8), (1., .05, .9),
                                                (1.5, .01, .8), (2., .05, .8), (4., .05, .8), (9., .05, .8), (-.7, .05, .8)])
def test_seeds_to_show_is_the_smallest_with_that_power(effect, level, power):
    n = seeds_to_show(effect, power=power, level=level)
    assert power_of(n, abs(effect), level) >= power - 1e-3
    assert n == 2 or power_of(n-1, abs(effect), level) < power + 1e-3

def test_seeds_to_show_by_simulation():
    n = seeds_to_show(1.)
    found = stats.ttest_1samp(np.random.default_rng(0).normal(1., 1., (20_000, n)), 0, axis=1).pvalue < .05
    assert .79 < found.mean() < .87

def test_seeds_to_show_at_the_ends():
    assert seeds_to_show(0.) == math.inf and seeds_to_show(.02) == math.inf and seeds_to_show(.031) < 10_000   # more than `most`
    assert seeds_to_show(.05, most=1000) == math.inf and seeds_to_show(1e9) == seeds_to_show(-1e9) == 2

def test_fewer_than_five_seeds_say_nothing_of_how_many_are_needed():
    for n in range(5): assert all(map(math.isnan, seeds_needed(with_effect(1., n) if n > 1 else [1.]*n, np.zeros(n))))
    assert all(map(math.isnan, seeds_needed([.5, math.nan, .6, .7, .8, .9], [.4]*6)))
    assert 2 <= seeds_needed(with_effect(1., 5), np.zeros(5))[0] < math.inf

def test_the_range_of_seeds_covers_the_true_number_in_80_percent_at_least_and_seldom_promises_few_where_there_is_no_effect():
    rng = np.random.default_rng(0)
    for effect in (.5, 1.):
        needed,drawn = seeds_to_show(effect),rng.normal(effect, 1, (300, 6))
        ranges = [seeds_needed(d, np.zeros(6)) for d in drawn]
        assert .75 < np.mean([low <= needed <= high for low,high in ranges]) < .95
    nothing = [seeds_needed(d, np.zeros(5)) for d in rng.normal(0, 1, (300, 5))]
    assert np.mean([high <= 10 for _,high in nothing]) < .03 and np.mean([high == math.inf for _,high in nothing]) > .7

def test_seeds_needed_of_equal_differences():
    base = np.array([330, 335, 341, 338, 329])
    assert seeds_needed((base+5)/360, base/360) == (2, 2)
    few,many = seeds_needed((base+1)/360, base/360, n_images=360)   # one more right, for every seed
    assert 2 <= few <= many <= 5
    assert seeds_needed(base/360, base/360)[1] == math.inf

@few
@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=5, max_size=12))
def test_seeds_needed_does_not_depend_on_units_or_signs(pairs):
    a,b = np.array(pairs).T
    d = a-b
    if d.std() < 1e-3 or abs(d.mean()) < 1e-3: return
    low,high = seeds_needed(a, b)
    assert 2 <= low <= high and seeds_needed(b, a) == (low, high) and seeds_needed(8*a, 8*b) == (low, high)


# ---------------------------------------------------------------- how often it errs

def tables(n_tables, n_methods, n_seeds, n_images, accuracy=.9, seed=0):
    "Accuracies of methods that are equally good, on as many images: `[tables, methods, seeds]`"
    return np.random.default_rng(seed).binomial(n_images, accuracy, (n_tables, n_methods, n_seeds))/n_images

def found_one(accs, n_images):
    "True if the headline of such a table names a method as ahead or behind, baseline first"
    base,*others = accs
    p = holm([paired_p(other, base, n_images) for other in others])
    return (p < .05).any()

@pytest.mark.parametrize('n_seeds', [2, 3, 5, 10])
@pytest.mark.parametrize('n_images', [100, 360, 1000, 10_000])
def test_with_no_effect_five_percent_of_tables_are_ahead_or_behind(n_seeds, n_images):
    accs = tables(5000, 2, n_seeds, n_images, seed=n_seeds*n_images)
    wrong = np.mean([found_one(one, n_images) for one in accs])
    assert .04 < wrong < .06
    told = np.array([found_one(one, n_images) for one in accs[:300]])
    inferred = np.array([verdict(paired_difference(one[1], one[0])) != 'open' for one in accs[:300]])   # how many images there were
    assert not (inferred & ~told).any() and (told & ~inferred).sum() <= 3

@pytest.mark.parametrize('n_seeds,n_images,n_methods', [(2, 100, 6), (3, 360, 11), (5, 1000, 6)])
def test_with_many_methods_five_percent_of_tables_at_most_name_one(n_seeds, n_images, n_methods):
    accs = tables(2000, n_methods, n_seeds, n_images)
    wrong = np.mean([found_one(one, n_images) for one in accs])
    alone = np.mean([any(paired_p(other, one[0], n_images) < .05 for other in one[1:]) for one in accs])
    assert wrong < .06 and alone > .1

def test_where_seeds_differ_by_less_than_an_image_ties_do_not_err_more():
    "The spread over seeds is smaller than one image, so most accuracies are equal"
    rng = np.random.default_rng(0)
    for n_seeds in (2, 3, 5, 10):
        for spread in (.3, .6, 1.):
            counts = np.round(rng.normal(90, spread, (2000, 2, n_seeds)))
            assert np.mean([found_one(one/100, 100) for one in counts]) < .06

def test_a_zero_width_would_have_erred_in_more_than_a_tenth_of_tables():
    counts = np.round(np.random.default_rng(0).normal(90, 1., (4000, 2, 2)))
    d = counts[:,1]-counts[:,0]
    before = np.mean((d[:,0] == d[:,1]) & (d[:,0] != 0))
    assert before > .1

@few
@given(st.lists(st.floats(0, 1) | st.just(math.nan), max_size=8))
def test_holm_is_its_step_down_procedure(p):
    "The smallest is rejected at .05/m, the next at .05/(m-1), … until one is not"
    known = sorted((value, i) for i,value in enumerate(p) if not math.isnan(value))
    rejected = set()
    for rank,(value,i) in enumerate(known):
        if value*(len(known)-rank) >= .05: break
        rejected.add(i)
    out = holm(p)
    assert {i for i,value in enumerate(out) if value < .05} == rejected
    assert all(math.isnan(o) == math.isnan(value) and not o < value for o,value in zip(out, p)) and not (out > 1).any()

@few
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8))
def test_p_is_below_five_percent_just_where_the_interval_misses_zero(pairs):
    a,b = np.array(pairs).T
    if 0 < (a-b).std() < 1e-6: return
    p,difference = paired_p(a, b),paired_difference(a, b)
    if abs(p-.05) > 1e-6: assert (p < .05) == (verdict(difference) != 'open')
    if (a-b).std() > 1e-6: assert p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-6, abs=1e-12)

@pytest.mark.parametrize('n', [100, 333, 359, 360, 3000, 9973, 10_000, 50_000])
def test_the_number_of_images_is_found_from_accuracies(n):
    k = np.random.default_rng(n).integers(n//2, n, 6)
    for accs in (k/n, np.float32(k/n)):
        found = counted_images(accs)
        assert found <= n and n%found == 0 or found == 100*math.ceil(n/100) or np.allclose(accs*found, np.round(accs*found), atol=1e-2)
    assert counted_images([math.pi/4, math.e/3, .123456789]) is None and counted_images([]) is None and counted_images([math.nan]) is None
