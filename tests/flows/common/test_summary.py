from flows.common.summary import build_table, build_terminal_table, list_comparisons, read_results


def figure(value: float, **more: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.02, "high": value + 0.02, "n": 400, **more}


METRICS = {
    "base": {"perplexity": figure(912.4), "exact_match": figure(0.02), "only_base": figure(1)},
    "tuned": {"perplexity": figure(3.1), "exact_match": figure(0.74), "throughput": {"tokens_per_s": 300}},
    "difference": {"exact_match": figure(0.72, p_value=0.0002), "perplexity": figure(-909.3, p_value=0.04)},
}


def test_metrics_of_both_models_are_paired_the_main_ones_first():
    assert build_table(list_comparisons(METRICS)) == [
        {
            "metric": "exact match",
            "base": "0.02 (0.00 to 0.04)",
            "tuned": "0.74 (0.72 to 0.76)",
            "difference": "+0.72, p < 0.001",
        },
        {
            "metric": "perplexity",
            "base": "912 (912 to 912)",
            "tuned": "3.10 (3.08 to 3.12)",
            "difference": "−909, p = 0.040",
        },
    ]


def test_a_difference_without_a_test_is_shown_without_p():
    (row,) = build_table(list_comparisons({"base": {"bleu": {"value": 1}}, "tuned": {"bleu": {"value": 3}}}))

    assert row == {"metric": "bleu", "base": "1.00", "tuned": "3.00", "difference": "+2.00"}


def test_the_terminal_shows_one_row_a_metric():
    assert build_terminal_table(list_comparisons(METRICS)).row_count == 2


def test_there_are_no_results_before_the_evaluation(tmp_path):
    assert read_results(tmp_path) is None
