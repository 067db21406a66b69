//! Flags that cannot be: exit code 2, the flag's name, nothing on stdout.

use crate::binary::{tinyserve, words};

#[test]
fn values_out_of_range_are_one_sentence() {
    let cases = [
        ("--page-size 0", "--page-size is 0"),
        ("--page-size 1G", "--page-size is 1073741824"),
        ("--block-size 0", "--page-size is 0"),
        ("--selection-ratio 0", "--selection-ratio is 0"),
        ("--selection-ratio 1.5", "--selection-ratio is 1.5"),
        ("--selection-ratio -0.5", "--selection-ratio is -0.5"),
        ("--selection-ratio NaN", "--selection-ratio is NaN"),
        ("--token-budget 0", "--token-budget is 0"),
        ("--temperature NaN", "--temperature is NaN"),
        ("--temperature -1", "--temperature is -1"),
        ("--temperature inf", "--temperature is inf"),
        ("--top-p 0", "--top-p is 0"),
        ("--top-p 1.1", "--top-p is 1.1"),
        ("--min-p -0.1", "--min-p is -0.1"),
        ("--min-p 2", "--min-p is 2"),
        ("--repetition-penalty 0", "--repetition-penalty is 0"),
        ("-n 0", "--max-tokens (-n) is 0"),
        ("-t 0", "--threads is 0"),
        ("-t 1M", "--threads is 1048576"),
        ("-t 2 --cpu scalar", "--threads is 2"),
        ("--attention-chunk-size 0", "--attention-chunk-size is 0"),
        ("--max-sequence-length 0", "--max-sequence-length is 0"),
        ("--max-model-len 513", "--max-sequence-length is 513, expected at most 512"),
        ("--selection-ratio 0.5 --token-budget 64", "--token-budget are both given"),
    ];
    for (flags, sentence) in cases {
        for json in ["", " --json"] {
            words(&format!("run -p hello {flags}{json}")).refused_with(2, &[sentence, "expected"]);
        }
    }
    tinyserve(&["run", "-p", "hello", "--stop", ""]).refused_with(2, &["--stop is empty"]);
    words("bench latency -r 0").refused_with(2, &["--repetitions is 0"]);
    words("bench latency -p 0 -n 0").refused_with(2, &["-p and -n are 0"]);
}

#[test]
fn what_comes_later_is_refused_by_name() {
    let cases = [
        ("--kv-cache-dtype fp8", ["--kv-cache-dtype", "bf16, int8 or int4"]),
        ("--scorer bocks", ["--scorer", "expected one of box, mean-std"]),
        ("--scorer h2o", ["--scorer", "expected one of box, mean-std"]),
        ("--device gpu", ["--device", "cuda:N"]),
        ("--device cuda:x", ["--device", "cuda:N"]),
    ];
    for (flags, words_of_error) in cases {
        let stderr = words(&format!("run -p hello {flags}")).refused(2);
        for word in words_of_error {
            assert!(stderr.contains(word), "{word:?} is not in {stderr:?}");
        }
    }
}

#[test]
fn nonsense_is_refused() {
    let cases = [
        ("run", "--prompt"),
        ("run -p a --prompt-file b", "--prompt-file"),
        ("run -p a --bogus", "--bogus"),
        ("run -p a -n many", "many"),
        ("run -p a -n 1.5", "1.5"),
        ("run -p a -n -1", "-1"),
        ("run -p a --seed x", "--seed"),
        ("run -p a --device tpu", "tpu"),
        ("run -p a --attention some", "some"),
        ("run -p a --cpu sse", "sse"),
        ("run -p a --scorer luck", "luck"),
        ("run -p a --weights int3", "int3"),
        ("run -p a --kv-cache-dtype fp8", "fp8"),
        ("tokenize", "--prompt"),
        ("tokenize -p a --page-size 8", "--page-size"),
        ("eval perplexity", "--text-file"),
        ("eval perplexity --text-file x --attention sparse", "--attention"),
        ("bench latency -o xml", "xml"),
        ("inspect --temperature 0", "--temperature"),
        ("completions klingon", "klingon"),
        ("frobnicate", "frobnicate"),
    ];
    for (args, word) in cases {
        let stderr = words(args).refused(2);
        assert!(stderr.contains(word), "{word:?} is not in {stderr:?}");
    }
}

#[test]
fn a_test_beyond_the_context_is_refused_with_its_numbers() {
    words("bench latency -p 600").refused_with(1, &["-p 600", "at most 512"]);
    words("bench latency -n 128 -d 400").refused_with(1, &["-n 128", "-d 400", "528", "512"]);
    words("bench latency -d 512").refused_with(1, &["-d 512", "512"]);
}
