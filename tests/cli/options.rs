//! Every option changes something that can be seen, whichever way it is given.

use serde_json::Value;
use tinyserve_tests::data;

use crate::binary::{Ran, command, text, tinyserve};

/// A prompt that is long enough to select pages: some 270 tokens.
fn prompt() -> String {
    "Once upon a time there was a little girl named Lily who loved to play. ".repeat(14)
}

/// What a run with `flags` and variables says about itself, timings and memory left out.
fn report(flags: &[&str], variables: &[(&str, &str)]) -> Value {
    let prompt = prompt();
    let args = ["run", "-p", &prompt, "--json", "-n", "40", "--seed", "3", "--ignore-eos"];
    // A flag may be given again by the case: the last one counts for none, so leave it out.
    let args: Vec<_> = match flags.first() {
        Some(&flag) => without(&args, flag),
        None => args.to_vec(),
    };
    let mut command = command(&[&args, flags].concat());
    command.envs(variables.iter().copied());
    let mut object = Ran::new(command.output().unwrap()).json();
    object["timings"] = Value::Null;
    object["memory"] = Value::Null;
    object
}

/// `args` without `flag` and its value.
fn without<'a>(args: &[&'a str], flag: &str) -> Vec<&'a str> {
    match args.iter().position(|arg| *arg == flag) {
        Some(at) => [&args[..at], &args[at + 2..]].concat(),
        None => args.to_vec(),
    }
}

#[test]
fn every_flag_of_run_has_an_effect() {
    // Each case: a base, the option, and what it must change.
    let select = ["--attention", "sparse", "--dense-layers", "0"];
    let none: [&str; 0] = [];
    let exits = ["--enable-entropy-early-exit", "--entropy-threshold", "100"];
    let late = [&exits[..], &["--min-tokens-before-exit", "0"]].concat();
    let prunes = ["--enable-token-pruning", "--pruning-ratio", "0.9"];
    let cases: [(&[&str], &[&str], &str); 39] = [
        (&none, &["-n", "3"], "/tokens"),
        (&none, &["--temperature", "0"], "/tokens"),
        (&none, &["--top-p", "0.05"], "/tokens"),
        (&none, &["--top-k", "1"], "/tokens"),
        (&none, &["--min-p", "0.99"], "/tokens"),
        (&none, &["--repetition-penalty", "5"], "/tokens"),
        (&none, &["--presence-penalty", "2"], "/tokens"),
        (&none, &["--frequency-penalty", "2"], "/tokens"),
        (&none, &["--seed", "4"], "/tokens"),
        (&none, &["--stop", "e"], "/finish_reason"),
        (&none, &["--page-size", "4"], "/kv/pages"),
        (&none, &["--block-size", "64"], "/kv/pages"),
        (&none, &["--kv-cache-dtype", "f16"], "/kv/bytes_resident"),
        (&none, &["--kv-cache-dtype", "bf16"], "/kv/bytes_resident"),
        (&none, &["--kv-cache-dtype", "int4"], "/kv/bytes_resident"),
        (&["--kv-cache-dtype", "int8"], &["--open-page-dtype", "f32"], "/kv/bytes_read"),
        (&none, &["--weights", "int4"], "/tokens"),
        (&none, &["--attention", "sparse"], "/kv/bytes_read"),
        (&none, &["--sparse-min-context", "100"], "/kv/bytes_read"),
        (&none, &["--max-sequence-length", "300"], "/tokens"),
        (&select, &["--selection-ratio", "0.7"], "/kv/bytes_read"),
        (&select, &["--token-budget", "64"], "/kv/bytes_read"),
        (&select, &["--top-p-pages", "0.9"], "/kv/bytes_read"),
        (&select, &["--scorer", "streaming"], "/kv/bytes_read"),
        (&select, &["--group-reduce", "softmax-vote"], "/kv/recall"),
        (&select, &["--sink-pages", "9"], "/kv/bytes_read"),
        (&select, &["--recent-pages", "9"], "/kv/bytes_read"),
        (&["--attention", "sparse"], &["--dense-layers", "5"], "/kv/bytes_read"),
        (&none, &["--approximate-attention", "box"], "/kv/bytes_read"),
        (&select, &["--adaptive", "--target-latency-ms", "0.0001"], "/kv/bytes_read"),
        (&select[2..], &["--attention", "sparse"], "/kv/reuse"),
        (&none, &exits, "/stop_reason"),
        (&exits[..1], &exits[1..], "/stop_reason"),
        (&exits, &["--min-tokens-before-exit", "5"], "/tokens"),
        (&exits[..1], &["--entropy-signal", "next-token"], "/tokens"),
        (&late, &["--entropy-patience", "3"], "/tokens"),
        (&none, &["--enable-token-pruning"], "/kv/pages"),
        (&prunes[..1], &prunes[1..], "/kv/pages"),
        (&prunes, &["--min-tokens-after-pruning", "200"], "/kv/pruned_tokens"),
    ];
    for (base, option, field) in cases {
        let before = report(base, &[]);
        let after = report(&[option, base].concat(), &[]);
        let (before, after) = (before.pointer(field), after.pointer(field));
        assert!(before.is_some() && before != after, "{option:?} leaves {field} at {before:?}");
    }
    let dense = [&["--attention", "dense"][..], &["--sparse-min-context", "100"]].concat();
    assert_eq!(report(&dense, &[])["kv"]["bytes_read_ratio"], 1.0);
}

#[test]
fn the_budget_follows_a_latency_and_says_so() {
    let prompt = prompt();
    let run = |flags: &[&str]| {
        let args = ["run", "-p", &prompt, "-n", "60", "--seed", "3", "--ignore-eos"];
        let select = ["--attention", "sparse", "--dense-layers", "0"];
        tinyserve(&[&args[..], &select, flags].concat())
    };
    // Slower than nothing, so down to the bound; three moves in 60 tokens.
    let slow =
        run(&["--adaptive", "--target-latency-ms", "0.0001", "--adaptive-min-budget", "0.6"]);
    let moves: Vec<_> = slow.stderr.lines().filter(|line| line.contains(" → ")).collect();
    let expected = ["0.300 → 0.240", "0.240 → 0.192", "0.192 → 0.180"];
    assert_eq!(moves.len(), 3, "{slow:?}");
    for (line, expected) in moves.iter().zip(expected) {
        assert!(line.contains(expected) && line.ends_with("target 0.000 ms"), "{line}");
    }
    let fast = run(&["--adaptive", "--target-latency-ms", "1e6", "--adaptive-max-budget", "1.2"]);
    assert!(fast.stderr.contains("selection_ratio 0.330 → 0.360: "), "{fast:?}");
    let refused: [(&[&str], &str); 6] = [
        (&["--adaptive", "--attention", "dense"], "--adaptive is true, expected false"),
        (&["--adaptive", "--dense-layers", "5"], "--dense-layers is 5, expected fewer than the 5"),
        (&["--adaptive", "--target-latency-ms", "0"], "--target-latency-ms is 0"),
        (&["--adaptive", "--adaptive-min-budget", "2"], "--adaptive-min-budget is 2"),
        (&["--adaptive", "--adaptive-max-budget", "0.5"], "--adaptive-max-budget is 0.5"),
        (&["--target-latency-ms", "5"], "--target-latency-ms is given, expected --adaptive"),
    ];
    for (flags, words) in refused {
        let ran = tinyserve(&[&["run", "-p", "a"], flags].concat());
        let stderr = ran.refused(2);
        assert!(stderr.contains(words), "{words:?} is not in {stderr:?}");
    }
}

#[test]
fn the_end_of_a_text_can_be_ignored() {
    // So hot that every token comes up, the one that ends a text included.
    let model = data("golden/llama-gqa");
    let run = |seed: &str, more: &[&str]| {
        let args = ["run", text(&model), "-p", "Hello", "-n", "1000", "--json", "--seed", seed];
        let hot = ["--temperature", "100", "--top-p", "1"];
        let object = tinyserve(&[&args[..], &hot, more].concat()).json();
        let tokens = object["tokens"].as_array().unwrap();
        (object["finish_reason"].as_str().unwrap().to_owned(), tokens.clone())
    };
    let stopped = (0..20).map(|seed| seed.to_string()).find_map(|seed| {
        let (reason, tokens) = run(&seed, &[]);
        (reason == "stop").then_some((seed, tokens))
    });
    let (seed, tokens) = stopped.expect("a text that ends");
    assert_eq!(tokens.last(), Some(&2.into()));
    let (reason, longer) = run(&seed, &["--ignore-eos"]);
    assert_eq!((reason.as_str(), longer.len()), ("length", 1000));
    assert_eq!(longer[..tokens.len()], tokens);
}

#[test]
fn what_changes_no_token_shows_in_verbose() {
    let cases = [
        (["--threads", "1"], "1 threads"),
        (["--cpu", "scalar"], "CPU, scalar"),
        (["--device", "cpu"], "\"device\":\"cpu\""),
        (["--attention-chunk-size", "7"], "\"attention_chunk_size\":7"),
        (["--rope-frequency-dtype", "weights"], "\"rope_frequency_dtype\":\"weights\""),
        (["--weights", "f32"], "\"weights\":\"f32\""),
        (["--kv-cache-dtype", "f32"], "\"kv_cache_dtype\":\"f32\""),
        (["--scorer", "box"], "\"scorer\":\"box\""),
    ];
    let quiet = tinyserve(&["run", "-p", "Once", "-n", "2", "--seed", "1"]);
    assert!(!quiet.stderr.contains("settings:"), "{quiet:?}");
    for ([flag, value], words) in cases {
        let ran = tinyserve(&["run", "-p", "Once", "-n", "2", "--seed", "1", "-v", flag, value]);
        assert!(ran.stderr.contains(words), "{words:?} is not in {:?}", ran.stderr);
        assert_eq!(ran.done(), quiet.stdout, "{flag} {value}");
    }
}

#[test]
fn chunks_and_paths_leave_the_text_as_it_is() {
    let expected = report(&["--temperature", "0"], &[]);
    for more in [["--attention-chunk-size", "7"], ["--cpu", "scalar"], ["--cpu", "portable"]] {
        let found = report(&[&["--temperature", "0"][..], &more].concat(), &[]);
        assert_eq!(found["text"], expected["text"], "{more:?}");
    }
}

#[test]
fn flags_come_before_variables_and_those_before_files() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("settings.toml");
    std::fs::write(&file, "page_size = 4\nkv_cache_dtype = \"f16\"\ntoken_budget = 64\n").unwrap();
    let pages = |flags: &[&str], variables: &[(&str, &str)]| {
        let prompt = prompt();
        let args = ["run", "-p", &prompt, "--json", "-n", "1", "--config", text(&file)];
        let mut command = command(&[&args[..], flags].concat());
        command.envs(variables.iter().copied());
        Ran::new(command.output().unwrap()).json()["kv"]["pages"].as_u64().unwrap()
    };
    let by_four = pages(&[], &[]);
    let by_eight = pages(&[], &[("TINYSERVE_PAGE_SIZE", "8")]);
    let by_sixteen = pages(&["--page-size", "16"], &[("TINYSERVE_PAGE_SIZE", "8")]);
    assert!(by_four.div_ceil(2) == by_eight && by_eight.div_ceil(2) == by_sixteen);
    assert_eq!(pages(&["--page-size", "4"], &[]), by_four);
    let all: Vec<_> = ["run", "-p", "a", "-n", "1", "-v", "--config", text(&file)].into();
    let settings = |flags: &[&str], variable: Option<&str>| {
        let mut command = command(&[&all, flags].concat());
        if let Some(budget) = variable {
            command.env("TINYSERVE_TOKEN_BUDGET", budget);
        }
        Ran::new(command.output().unwrap()).stderr
    };
    assert!(settings(&[], None).contains("\"token_budget\":64"));
    // A share that is asked for replaces a budget that a file or a variable asks for.
    for variable in [None, Some("128")] {
        let with_share = settings(&["--selection-ratio", "0.5"], variable);
        assert!(with_share.contains("\"selection_ratio\":0.5"), "{with_share}");
        assert!(!with_share.contains("token_budget"), "{with_share}");
    }
    assert!(settings(&[], Some("128")).contains("\"token_budget\":128"));
}

#[test]
fn every_variable_does_what_its_flag_does() {
    let sparse = ("TINYSERVE_ATTENTION", "sparse");
    let dense_layers = ("TINYSERVE_DENSE_LAYERS", "0");
    let cases = [
        ("TINYSERVE_TEMPERATURE", "0"),
        ("TINYSERVE_TOP_K", "1"),
        ("TINYSERVE_PAGE_SIZE", "4"),
        ("TINYSERVE_KV_CACHE_DTYPE", "f16"),
        ("TINYSERVE_SELECTION_RATIO", "0.8"),
        ("TINYSERVE_SINK_PAGES", "9"),
        ("TINYSERVE_RECENT_PAGES", "9"),
        ("TINYSERVE_MAX_SEQUENCE_LENGTH", "300"),
    ];
    for (name, value) in cases {
        let flag = format!("--{}", name["TINYSERVE_".len()..].to_lowercase().replace('_', "-"));
        let by_flag = report(&[&flag, value], &[sparse, dense_layers]);
        let by_variable = report(&[], &[sparse, dense_layers, (name, value)]);
        assert_eq!(by_flag, by_variable, "{name}");
        assert_ne!(by_flag, report(&[], &[sparse, dense_layers]), "{name}");
    }
    let exits = ("TINYSERVE_ENABLE_ENTROPY_EARLY_EXIT", "true");
    let certain = ("TINYSERVE_ENTROPY_THRESHOLD", "100");
    let least = ("TINYSERVE_MIN_TOKENS_BEFORE_EXIT", "7");
    let object = report(&[], &[exits, certain, least]);
    assert_eq!(object["tokens"].as_array().unwrap().len(), 7);
    assert_eq!(object["finish_reason"], "stop");
    assert_eq!(object["stop_reason"], "entropy_early_exit");
    let prunes = ("TINYSERVE_ENABLE_TOKEN_PRUNING", "1");
    let all = ("TINYSERVE_PRUNING_RATIO", "1");
    let left = ("TINYSERVE_MIN_TOKENS_AFTER_PRUNING", "64");
    assert!(report(&[], &[prunes, all, left])["kv"]["pages"].as_u64().unwrap() <= 8);
    let mut command = command(&["run", "-p", "a"]);
    command.env("TINYSERVE_SELECTION_RATIO", "2");
    Ran::new(command.output().unwrap()).refused_with(2, &["--selection-ratio is 2"]);
}

#[test]
fn plugins_are_set_by_files_and_their_settings_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("settings.toml");
    let settings = "enable_token_pruning = true\npruning_ratio = 0.5\n\
        min_tokens_after_pruning = 64\nenable_entropy_early_exit = true\n\
        entropy_threshold = 100\nmin_tokens_before_exit = 12\n";
    std::fs::write(&file, settings).unwrap();
    let object = report(&["--config", text(&file)], &[]);
    assert_eq!(object["tokens"].as_array().unwrap().len(), 12);
    assert!(object["kv"]["pruned_tokens"].as_u64().unwrap() >= 100, "{object}");
    let pages = object["kv"]["pages"].as_u64().unwrap();
    let whole = report(&["-n", "12"], &[])["kv"]["pages"].as_u64().unwrap();
    assert!(pages < whole * 2 / 3, "{pages} of {whole} pages are left");
    // A share of nothing prunes nothing, bit for bit.
    let nothing = report(&["--enable-token-pruning", "--pruning-ratio", "0"], &[]);
    assert_eq!(nothing, report(&[], &[]));
    let refused: [(&[&str], &str); 7] = [
        (&["--enable-token-pruning", "--kv-cache-dtype", "int8"], "where tokens are pruned"),
        (&["--entropy-threshold", "1"], "--enable-entropy-early-exit"),
        (&["--pruning-ratio", "0.5"], "--enable-token-pruning"),
        (&["--enable-entropy-early-exit", "--entropy-threshold", "0"], "--entropy-threshold is 0"),
        (&["--enable-token-pruning", "--pruning-ratio", "1.5"], "--pruning-ratio is 1.5"),
        (&["--enable-entropy-early-exit", "--entropy-signal", "both"], "attention or next-token"),
        (&["--approximate-attention", "linear"], "cuboid-mean"),
    ];
    for (flags, words) in refused {
        let ran = tinyserve(&[&["run", "-p", "a"], flags].concat());
        let stderr = ran.refused(2);
        assert!(stderr.contains(words), "{words:?} is not in {stderr:?}");
    }
}
