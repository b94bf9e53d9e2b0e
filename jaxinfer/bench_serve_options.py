"""Options of `jaxinfer bench serve`, named as in `vllm bench serve` where that has them. No jax here."""

import argparse

from jaxinfer.options import Option, count, file

SERVER = (
    Option("host", str, "127.0.0.1", "where the server listens"),
    Option("port", count, 50051, "its port"),
    Option("address", str, None, "host:port or unix:FILE, instead of --host and --port"),
    Option("ready_check_timeout_sec", float, 0.0, "wait so long for the server to be ready"),
    Option("tls", bool, False, "use TLS; the server is checked against this machine's authorities"),
    Option("tls_ca", file, None, "PEM certificates of the authorities to check it against instead"),
    Option("tls_cert", file, None, "PEM certificate to show to the server"),
    Option("tls_key", file, None, "PEM key of that certificate"),
    Option("tls_server_name", str, None, "the name in the server's certificate, where it is reached by another"),
    Option("token_file", file, None, "file with the token to send; a line TENANT TOKEN of the server's file does too"),
    Option("insecure", bool, False, "send the token to another machine without TLS"),
    Option("connections", count, None, "connections to spread the requests over (default: one for 200 at once)"),
    Option("metrics_url", str, None, "its metrics, as http://127.0.0.1:9464/metrics: shows what speculation kept"),
)
LOAD = (
    Option("num_prompts", count, 1000, "requests to send"),
    Option("request_rate", float, float("inf"), "arrivals a second; inf: all at once"),
    Option("burstiness", float, 1.0, "of the gaps: 1 is Poisson, less comes in bursts, more is even, inf is a clock"),
    Option("max_concurrency", count, None, "requests that run at once; others wait here, and that counts as latency "
           "unless the rate is inf (default: no limit)"),
    Option("num_warmups", count, 0, "requests before the others, which do not count"),
    Option("timeout", float, None, "deadline of a request in seconds (default: none)"),
    Option("seed", count, 0, "of arrivals and prompts"),
)
DATASET = (
    Option("dataset_name", str, None, "random, custom or sharegpt (default: random; with --dataset-path the file's)"),
    Option("dataset_path", file, None, 'custom: lines {"prompt": .., "output_tokens": ..}; sharegpt: its JSON'),
    Option("random_input_len", count, 1024, "tokens a prompt, behind the prefix"),
    Option("random_output_len", count, 128, "tokens an output"),
    Option("random_range_ratio", float, 0.0, "lengths are drawn between 1 - X and 1 + X times those two"),
    Option("random_prefix_len", count, 0, "tokens in front that all prompts share"),
    Option("cache_salt", str, None, "share cached prefixes with runs of this salt (default: within the run)"),
    Option("output_len", count, None, "tokens an output, whatever the dataset says"),
)
SAMPLING = (
    Option("ignore_eos", bool, None, "let outputs go on to their full length (default: with random alone)"),
    Option("temperature", float, None, "0 is greedy (default: the server's)"),
    Option("top_p", float, None, "smallest set of tokens with this much probability (default: the server's)"),
    Option("top_k", count, None, "most likely tokens to choose from (default: the server's)"),
)
RESULT = (
    Option("percentile_metrics", str, "ttft,tpot,itl,e2el", "what to show; also client_queue_time, server_ttft, "
           "server_queue"),
    Option("metric_percentiles", str, "99", "which percentiles of it, as 50,90,99.9"),
    Option("save_result", file, None, "write the figures as JSON, under vLLM's names"),
    Option("save_detailed", bool, False, "with those of each request, and its text"),
    Option("plot", file, None, "write a picture of the run (.svg)"),
    Option("json", bool, False, "print the JSON instead of the table"),
    Option("disable_tqdm", bool, False, "no progress bar"),
)
GOODPUT = Option("goodput", str, None, "KEY:MS ..., keys ttft, tpot, e2el: count requests that stay within all of them")
OTHER_NAMES = {"dataset_name": "--dataset", "random_input_len": "--input-len"}
GROUPS = {"server": SERVER, "load": LOAD, "dataset": DATASET, "sampling": SAMPLING, "result": RESULT}
BENCH_SERVE_OPTIONS = (*(option for group in GROUPS.values() for option in group), GOODPUT)
"""Arguments of serve.bench.config.BenchConfig; a test compares names and defaults with it."""


def add_bench_serve_options(parser: argparse.ArgumentParser) -> None:
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            option.add_to(group, *([OTHER_NAMES[option.name]] if option.name in OTHER_NAMES else []))
    parser.add_argument("--goodput", nargs="+", metavar="KEY:MS", help=GOODPUT.help)
