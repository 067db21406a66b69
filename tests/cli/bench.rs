//! `bench latency`: rows that hold together.

use serde_json::Value;

use crate::binary::{text, tinyserve, words};

fn rows(args: &str) -> Vec<Value> {
    let rows = words(&format!("bench latency -o json {args}")).json();
    rows.as_array().expect("an array of rows").clone()
}

fn number(row: &Value, name: &str) -> f64 {
    row[name].as_f64().unwrap_or_else(|| panic!("{name} of {row}"))
}

#[test]
fn quantised_weights_are_smaller_and_say_so() {
    let size = |weights: &str| {
        let args = ["bench", "latency", "-p", "8", "-n", "0", "-r", "1", "-o", "json", "--weights"];
        let rows = tinyserve(&[&args[..], &[weights]].concat()).json();
        assert_eq!(rows[0]["weights"], weights);
        rows[0]["model_size"].as_u64().unwrap()
    };
    let (stored, int8, int4) = (size("f32"), size("int8"), size("int4"));
    assert!(int4 < int8 && 3 * int8 < stored, "{stored} {int8} {int4}");
}

#[test]
fn rows_hold_together() {
    let rows = rows("-p 32,64 -n 8 -d 0,100 -r 3 -t 1");
    let sizes = |row: &Value| {
        ["n_prompt", "n_gen", "n_depth"].map(|name| row[name].as_u64().expect("a size"))
    };
    let found: Vec<_> = rows.iter().map(sizes).collect();
    let expected = [[32, 0, 0], [64, 0, 0], [0, 8, 0], [32, 0, 100], [64, 0, 100], [0, 8, 100]];
    assert_eq!(found, expected);
    for row in &rows {
        assert_eq!(row["model"], "builtin:stories260k");
        assert_eq!(row["model_n_params"], 260_032);
        assert_eq!(row["model_size"], 4 * 260_032);
        assert_eq!((&row["weights"], &row["kv_cache_dtype"]), (&"f32".into(), &"f32".into()));
        assert_eq!((&row["n_threads"], &row["n_ubatch"]), (&1.into(), &256.into()));
        assert_eq!((&row["page_size"], &row["n_batch"]), (&16.into(), &1.into()));
        assert_eq!(row["depth_fill"], "prefill");
        assert!(number(row, "read_bandwidth_gb_s") > 0.01);
        if sizes(row)[1] == 0 {
            assert_eq!((&row["bytes_per_token"], &row["step_split"]), (&Value::Null, &Value::Null));
        } else {
            let expected = 4.0 * 260_032.0;
            let bytes = number(row, "bytes_per_token");
            assert!(bytes > expected && bytes < 1.2 * expected, "{bytes}");
            let fraction = number(row, "roofline_fraction");
            assert!(fraction > 0.0 && fraction < 100.0, "{fraction}");
            for part in ["weights_ns", "attend_ns", "rest_ns"] {
                assert!(number(&row["step_split"], part) > 0.0, "{row}");
            }
        }
        assert!(row["cpu_path"].is_string() && row["attention"].is_string());
        // The plan is kept.
        assert!(number(row, "rss_bytes") <= 1.05 * number(row, "planned_bytes"), "{row}");
        assert_eq!(row["bytes_read_ratio"], 1.0);
        let tokens = (sizes(row)[0] + sizes(row)[1]) as f64;
        let ns: Vec<_> = row["samples_ns"].as_array().unwrap().iter().collect();
        let ts: Vec<_> = row["samples_ts"].as_array().unwrap().iter().collect();
        assert_eq!((ns.len(), ts.len()), (3, 3));
        let mut sum = 0.0;
        for (ns, ts) in ns.iter().zip(&ts) {
            let (ns, ts) = (ns.as_f64().unwrap(), ts.as_f64().unwrap());
            assert!((ts * ns / 1e9 / tokens - 1.0).abs() < 1e-3, "{row}");
            sum += ns;
        }
        assert!((number(row, "avg_ns") - sum / 3.0).abs() < 2.0, "{row}");
        assert!(number(row, "avg_ts") > 0.0 && number(row, "stddev_ts") >= 0.0);
        assert!(number(row, "stddev_ns") >= 0.0);
        if cfg!(target_os = "linux") {
            let resident = number(row, "rss_bytes");
            assert!(resident > 1e6 && resident < 100e6, "{resident}");
        }
    }
}

#[test]
fn attention_modes_are_compared() {
    let rows = rows(
        "-p 0 -n 8 -d 256 -r 2 --attention dense,sparse --dense-layers 0 --selection-ratio 0.25",
    );
    assert_eq!(rows.len(), 2);
    assert_eq!((&rows[0]["attention"], &rows[1]["attention"]), (&"dense".into(), &"sparse".into()));
    assert_eq!(number(&rows[0], "bytes_read_ratio"), 1.0);
    // A quarter of the keys and values, and the boxes, a sixteenth of the keys and values.
    let ratio = number(&rows[1], "bytes_read_ratio");
    assert!(ratio > 0.25 && ratio < 0.40, "{ratio}");
    assert_eq!(rows[0]["median_ts_ratio"], Value::Null);
    assert!(number(&rows[1], "median_ts_ratio") > 0.1);
    for part in ["score_ns", "select_ns"] {
        assert_eq!(number(&rows[0]["step_split"], part), 0.0);
        assert!(number(&rows[1]["step_split"], part) > 0.0, "{}", rows[1]);
    }
}

#[test]
fn default_sizes_fit_the_context_and_say_so() {
    let ran = words("bench latency -d 448 -r 1 -o json");
    assert!(ran.stderr.contains("-p is 64 at -d 448, not 512"), "{}", ran.stderr);
    assert!(ran.stderr.contains("-n is 64 at -d 448, not 128"), "{}", ran.stderr);
    let rows = ran.json();
    assert_eq!((&rows[0]["n_prompt"], &rows[1]["n_gen"]), (&64.into(), &64.into()));
}

#[test]
fn tables_have_a_row_per_test() {
    let markdown = words("bench latency -p 16 -n 4 -r 1").done();
    let lines: Vec<_> = markdown.lines().collect();
    assert_eq!(lines.len(), 4, "{markdown}");
    assert!(lines[2].contains("| pp16 |") && lines[3].contains("| tg4 |"), "{markdown}");
    assert!(lines.iter().all(|line| line.matches('|').count() == 14), "{markdown}");
    let csv = words("bench latency -p 16 -n 4 -r 1 -o csv").done();
    let lines: Vec<_> = csv.lines().map(|line| line.split(',').count()).collect();
    assert_eq!(lines.len(), 3, "{csv}");
    assert!(lines.iter().all(|&columns| columns == lines[0]), "{csv}");
}

#[test]
fn a_missing_model_is_named() {
    tinyserve(&["bench", "latency", "no/model", "-o", "json"]).refused_with(1, &["no/model"]);
}

#[test]
fn shapes_need_no_files_and_no_limit() {
    let shape = "--shape tiny-gpt2 -t 1 -r 1 -n 4";
    let of = |more: &str| rows(&format!("{shape} {more}"));
    // Four times the context that the shape was published with.
    let found = of("-p 0 -d 1000 -b 1,3 --selection-ratio 0.5 --attention sparse");
    assert_eq!((&found[0]["n_batch"], &found[1]["n_batch"]), (&1.into(), &3.into()));
    for row in &found {
        assert_eq!((&row["model"], &row["depth_fill"]), (&"tiny-gpt2".into(), &"synthetic".into()));
        assert_eq!((&row["weights"], &row["kv_cache_dtype"]), (&"f16".into(), &"f16".into()));
        assert_eq!(row["selection_ratio"], 0.5);
        let tokens = 4.0 * number(row, "n_batch");
        let seconds = number(row, "avg_ns") / 1e9;
        assert!((number(row, "avg_ts") * seconds / tokens - 1.0).abs() < 1e-3, "{row}");
    }
    // Three sequences of 512 bytes a token, and the boxes, a sixteenth of that.
    let kv = number(&found[0], "kv_bytes");
    assert!(kv > 3.0 * 1004.0 * 512.0 && kv < 3.0 * 1040.0 * 512.0 * 1.07, "{kv}");
    // Weights are read once for the three sequences, keys and values for each.
    let bytes = |row: &Value| number(row, "bytes_per_token");
    assert!(bytes(&found[1]) < 0.9 * bytes(&found[0]) && bytes(&found[1]) > 0.3 * bytes(&found[0]));
    let real = of("-p 0 -d 64 --real-prefill --dtype f32");
    assert_eq!((&real[0]["depth_fill"], &real[0]["weights"]), (&"prefill".into(), &"f32".into()));
    // Matrices double; biases and norms are f32 beside weights of every type; the shorter context
    // needs fewer positions.
    let (hidden, layers, inner) = (64.0, 2.0, 256.0);
    let biases = layers * (3.0 * hidden + hidden + inner + hidden);
    let norms = (2.0 * layers + 1.0) * 2.0 * hidden;
    assert_eq!(
        number(&real[0], "model_size"),
        2.0 * number(&found[0], "model_size")
            - 4.0 * (biases + norms)
            - 4.0 * hidden * (1004.0 - 256.0)
    );
    let default = of("");
    assert_eq!((&default[0]["n_prompt"], &default[1]["n_gen"]), (&512.into(), &4.into()));
}

#[test]
fn throughput_counts_the_whole_batch() {
    let command = "bench throughput --shape tiny-llama -p 20 -n 5 -r 1 -t 1";
    let rows = words(&format!("{command} -b 1,3 -o json")).json();
    let rows = rows.as_array().unwrap();
    for (row, n_batch) in rows.iter().zip([1, 3]) {
        assert_eq!((&row["n_batch"], &row["n_prompt"]), (&n_batch.into(), &20.into()));
        assert_eq!((&row["n_gen"], &row["model"]), (&5.into(), &"tiny-llama".into()));
        assert_eq!((&row["completed"], &row["failed"]), (&n_batch.into(), &0.into()));
        assert_eq!(row["total_input_tokens"], 20 * n_batch);
        assert_eq!(
            (&row["total_output_tokens"], &row["n_threads"]),
            (&(5 * n_batch).into(), &1.into())
        );
        let tokens = number(row, "total_token_throughput") * number(row, "duration");
        assert!((tokens - 25.0 * f64::from(n_batch)).abs() < 1e-6, "{row}");
        assert!(number(row, "pp_ts") > 0.0 && number(row, "tg_ts") > 0.0, "{row}");
    }
    let text = words(&format!("{command} -b 1,3")).done();
    assert_eq!(text.matches("Serving Benchmark Result").count(), 2, "{text}");
    assert!(text.contains("Sequences together:                      3"), "{text}");
    assert!(text.lines().last().unwrap().starts_with("3 together decode "), "{text}");
    let csv = words(&format!("{command} -b 2 -o csv")).done();
    assert_eq!(csv.lines().count(), 2);
    words(&format!("{command} -b 0")).refused_with(2, &["--n-batch (-b) is 0"]);
    words("bench throughput -p 500 -n 50").refused_with(2, &["550", "at most 512"]);
}

#[test]
fn attention_is_compared_with_dense() {
    let command = "bench attention --q-heads 8 --kv-heads 2 --head-dim 64 --tokens 2k -r 1 -t 1";
    let rows = words(&format!("{command} --ratios 0.25,1 --page-size 32 -o json")).json();
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 3);
    // 2048 tokens of two heads of 64 channels, f16.
    let of_one = 2.0 * 2.0 * 2048.0 * 2.0 * 64.0;
    assert_eq!(number(&rows[0], "bytes_per_step"), of_one);
    for row in rows {
        assert!(number(row, "n_layers") * of_one >= 384.0 * 1024.0 * 1024.0, "{row}");
        assert!(number(row, "median_ns") > 0.0 && number(row, "gb_s") > 0.0, "{row}");
        assert_eq!((&row["clock"], &row["host_ns"]), (&"host".into(), &Value::Null));
        assert!(number(row, "read_bandwidth_gb_s") > 0.01, "{row}");
        let fma = number(row, "fma_fraction");
        // Four query heads share each f16 element: 4 FLOP per byte of keys and values, none for
        // boxes.
        let read = of_one * row["selection_ratio"].as_f64().unwrap_or(1.0);
        let share = read / number(row, "bytes_per_step");
        let expected = 4.0 * share * number(row, "gb_s") / number(row, "fma_gflop_s");
        assert!((fma / expected - 1.0).abs() < 1e-6, "{row}");
        let ratio = number(row, "roofline_fraction") * number(row, "read_bandwidth_gb_s");
        assert!((ratio / number(row, "gb_s") - 1.0).abs() < 1e-6, "{row}");
    }
    assert_eq!((&rows[0]["attention"], &rows[0]["speedup"]), (&"dense".into(), &1.0.into()));
    // A quarter of the keys and values, and boxes of 1/32.
    let ceiling = number(&rows[1], "byte_ceiling");
    assert!((ceiling - 1.0 / (0.25 + 1.0 / 32.0)).abs() < 0.1, "{ceiling}");
    let wide = words(&format!("{command} --kv-cache-dtype f32 --ratios 0.5 -o json")).json();
    assert_eq!(number(&wide[0], "bytes_per_step"), 2.0 * of_one);
    // The query's own page, which is full, is read as it was appended.
    let codes = words(&format!("{command} --kv-cache-dtype int8 --ratios 0.5 -o json")).json();
    let share = number(&codes[0], "bytes_per_step") / of_one;
    assert!((0.5..0.62).contains(&share), "{share}");
    for placement in ["groups", "alternating"] {
        let flags = format!("--sequences 2 --placement {placement} --ratios 0.5 -o json");
        let two = words(&format!("{command} {flags}")).json();
        assert_eq!(number(&two[0], "bytes_per_step"), 2.0 * of_one);
        assert_eq!((&two[1]["n_sequences"], &two[1]["placement"]), (&2.into(), &placement.into()));
    }
    for (flags, sentence) in [
        ("--kv-heads 1,3", "--kv-heads is 3"),
        ("--plot x.png", "--plot is x.png"),
        ("--sequences 0", "--sequences is 0"),
        ("--placement alternating", "--sequences is 1"),
        ("--ratios 1.5", "--ratios is 1.5"),
        ("--tokens 0", "--tokens is 0"),
        ("-r 0", "--repetitions is 0"),
        ("--page-size 1M", "--page-size is 1048576"),
    ] {
        words(&format!("bench attention {flags}")).refused_with(2, &[sentence, "expected"]);
    }
}

#[test]
fn attention_is_measured_by_every_scorer() {
    let flags = "bench attention --q-heads 4 --kv-heads 2 --head-dim 64 --tokens 2k -r 1 -t 1 \
                 --layers 1 --ratios 0.25 --scorer box,mean-std,two-boxes,oracle";
    let rows = words(&format!("{flags} -o json")).json();
    let rows = rows.as_array().unwrap();
    let scorers: Vec<_> = rows.iter().map(|row| row["scorer"].as_str()).collect();
    assert_eq!(scorers, [None, Some("box"), Some("mean-std"), Some("two-boxes"), Some("oracle")]);
    // Beside keys and values of two heads in f16: a box for each of 128 pages, once, twice, thrice.
    let of_boxes = |row: &Value| number(row, "bytes_resident") - 2.0 * 2.0 * 2048.0 * 2.0 * 64.0;
    let one = 128.0 * 2.0 * 2.0 * 64.0 * 2.0;
    let counts: Vec<_> = rows.iter().map(|row| of_boxes(row) / one).collect();
    assert_eq!(counts, [1.0, 1.0, 2.0, 3.0, 1.0]);
    // Both rows of the box in any case: two query heads share it.
    assert_eq!(rows[1]["bytes_per_step"], rows[2]["bytes_per_step"]);
    assert!(number(&rows[3], "bytes_per_step") > number(&rows[2], "bytes_per_step"));
    assert!(words(flags).done().contains("| sparse mean-std 0.25 |"));
    let unknown = words("bench attention --scorer bocks").refused(2);
    assert!(unknown.contains("bocks") && unknown.contains("cuboid-mean"), "{unknown}");
}

#[test]
fn attention_is_swept_and_split() {
    let home = tempfile::tempdir().unwrap();
    let plot = home.path().join("plot.svg");
    let sweep = "bench attention --q-heads 8 --kv-heads 2 --head-dim 64 --tokens 1k,2k -r 2 -t 1 \
                 --ratios 0.25 --warm-ups 0";
    let command = format!("{sweep} --num-pages 32 -o json --plot {}", text(&plot));
    let rows = words(&command).json();
    let rows = rows.as_array().unwrap();
    let sizes: Vec<_> = rows
        .iter()
        .map(|row| [&row["n_tokens"], &row["page_size"]].map(|n| n.as_u64().unwrap()))
        .collect();
    assert_eq!(sizes, [[1024, 32], [1024, 32], [2048, 64], [2048, 64]]);
    for row in rows {
        let ms = number(row, "avg_attention_time_ms");
        assert!((1e6 * ms / number(row, "avg_ns") - 1.0).abs() < 1e-9, "{row}");
        let throughput = number(row, "throughput_tokens_per_ms");
        assert!((throughput * ms / number(row, "n_tokens") - 1.0).abs() < 1e-9, "{row}");
        let [score, select, attend] =
            ["score_ns", "select_ns", "attend_ns"].map(|phase| number(row, phase));
        assert!(attend > 0.0, "{row}");
        // Keys and values of two heads in f16, and boxes of a page's two corners.
        let [tokens, page] = [number(row, "n_tokens"), number(row, "page_size")];
        let kept = 2.0 * 64.0 * 2.0 * (2.0 * tokens + 2.0 * tokens / page);
        assert_eq!(number(row, "bytes_resident"), kept, "{row}");
        assert_eq!(score + select > 0.0, row["attention"] == "sparse", "{row}");
    }
    let svg = std::fs::read_to_string(&plot).unwrap();
    assert!(svg.contains("ratio 0.25, pages of 32") && svg.contains("dense"), "{svg}");
    let table = words(&format!("{sweep} --page-size 16")).done();
    let last = table.trim_end().lines().last().unwrap();
    assert!(last.starts_with("ratio 0.25, pages of 16, f16, 8/2 heads: "), "{table}");
    assert!(last.contains("pay"), "{table}");
}

#[test]
fn what_cannot_be_run_is_refused() {
    let bench = "bench latency";
    words(&format!("{bench} --shape gpt2-345m -d 1M -b 64")).refused_with(1, &["available"]);
    words(&format!("{bench} -b 0")).refused_with(2, &["--n-batch (-b) is 0"]);
    for (flags, word) in [
        ("--shape gpt5", "gpt2-124m"),
        ("builtin:stories260k --shape tiny-gpt2", "--shape"),
        ("--dtype f16", "--shape"),
        ("--shape tiny-gpt2 --dtype int9", "bf16"),
        ("--real-prefill", "--shape"),
    ] {
        let stderr = words(&format!("{bench} {flags}")).refused(2);
        assert!(stderr.contains(word), "{stderr}");
    }
}

#[test]
fn requests_that_arrive_over_time_are_counted_in_vllms_words() {
    let command = "bench serve -p 20 -n 5 --num-prompts 9 --request-rate 200 -t 1";
    let text = words(command).done();
    for line in [
        "============ Serving Benchmark Result ============",
        "Successful requests:                     9",
        "Total input tokens:                      180",
        "Total generated tokens:                  45",
        "---------------Time to First Token----------------",
        "-----Time per Output Token (excl. 1st token)------",
        "---------------Inter-token Latency----------------",
    ] {
        assert!(text.contains(line), "{line:?} is not in\n{text}");
    }
    let object = words(&format!("{command} --json --max-num-seqs 2 --max-concurrency 3")).json();
    assert_eq!((&object["completed"], &object["failed"]), (&9.into(), &0.into()));
    for (name, kind) in [("ttft", "mean"), ("tpot", "median"), ("itl", "p99")] {
        assert!(number(&object, &format!("{kind}_{name}_ms")) > 0.0, "{object}");
    }
    let rate = number(&object, "total_output_tokens") / number(&object, "duration");
    assert!((rate / number(&object, "output_throughput") - 1.0).abs() < 1e-9);
}

#[test]
fn requests_whose_callers_leave_leave_no_page() {
    let command = "bench serve -p 10 -n 20 --num-prompts 60 --max-concurrency 8 -t 1 --json";
    let object = words(&format!("{command} --abort-share 0.5")).json();
    let [completed, aborted] = ["completed", "aborted"].map(|name| number(&object, name));
    assert!(completed > 0.0 && aborted > 0.0 && completed + aborted == 60.0, "{object}");
    assert_eq!((&object["failed"], &object["pages_used"]), (&0.into(), &0.into()));
    let object = words(&format!("{command} --max-num-seqs 1 --max-num-queued-reqs 1")).json();
    let [completed, rejected] = ["completed", "rejected"].map(|name| number(&object, name));
    assert!(completed > 0.0 && rejected > 0.0 && completed + rejected == 60.0, "{object}");
    words(&format!("{command} --abort-share 2")).refused_with(2, &["--abort-share is 2"]);
}

#[test]
fn a_turn_of_a_conversation_computes_what_is_new() {
    let command = "bench conversation --turns 3 -p 40 --n-new 8 -n 6 -r 1 -t 1";
    let rows = words(&format!("{command} -o json")).json();
    let rows = rows.as_array().unwrap();
    let sizes: Vec<_> =
        rows.iter().map(|row| ["n_prompt", "n_cached"].map(|name| number(row, name))).collect();
    // The last token of an answer is not computed before something follows it.
    assert_eq!(sizes, [[40.0, 0.0], [54.0, 45.0], [68.0, 59.0]]);
    for row in rows {
        assert!(number(row, "ttft_ms") > 0.0 && number(row, "ttft_alone_ms") > 0.0, "{row}");
    }
    assert_eq!(words(command).done().lines().count(), 5);
    words("bench conversation --turns 0").refused_with(2, &["--turns is 0"]);
    words("bench conversation -p 500 -n 50").refused_with(2, &["at most 512"]);
}

#[test]
fn devices_of_a_load_are_checked() {
    let command = "bench serve --num-prompts 1 -n 2";
    for (flags, sentence) in [
        ("--tensor-parallel-size 2", "--tensor-parallel-size is 2, expected 1"),
        ("--gpu-ids 0,0", "--gpu-ids is [0, 0]"),
        ("--num-gpus 2 --gpu-ids 1", "--gpu-ids is [1], expected 2"),
        ("--num-gpus 2 --device cpu", "--device is cpu, expected auto or cuda"),
        ("--num-gpus 0", "--num-gpus is 0"),
        ("--replicas 0", "--replicas is 0"),
    ] {
        words(&format!("{command} {flags}")).refused_with(2, &[sentence]);
    }
    // No machine has so many.
    words(&format!("{command} --gpu-ids 97,98")).refused_with(1, &["CUDA"]);
    let object = words(&format!("{command} --replicas 2 -t 2 --json")).json();
    assert_eq!(object["completed"], 1);
}

#[test]
fn traces_are_replayed() {
    for (name, prompts) in [("azure-conversation.csv", 6), ("mooncake-conversation.jsonl", 6)] {
        let trace = tinyserve_tests::data(&format!("data/traces/{name}"));
        let trace = text(&trace);
        let scale = ["--time-scale", "0", "--length-scale", "0.01", "--num-prompts", "6"];
        let args = ["bench", "serve", "--trace", trace, "--json", "-t", "1"];
        let object = tinyserve(&[&args[..], &scale].concat()).json();
        assert_eq!(object["completed"], prompts, "{object}");
    }
    words("bench serve --trace none.csv").refused_with(1, &["none.csv", "cannot be read"]);
    words("bench serve --request-rate 0").refused_with(2, &["--request-rate is 0"]);
    words("bench serve --num-prompts 0").refused_with(2, &["--num-prompts is 0"]);
}

#[test]
fn memory_rows_are_what_became_resident() {
    let args = "bench memory -o json --shape llama-15m -d 4k --kv-cache-dtype f16,int8,int4";
    let rows = words(args).json();
    let rows = rows.as_array().expect("an array of rows");
    let names: Vec<_> = rows.iter().map(|row| row["kv_cache_dtype"].as_str().unwrap()).collect();
    assert_eq!(names, ["f16", "int8", "int4"]);
    for row in rows {
        assert_eq!((&row["shape"], &row["n_depth"]), (&"llama-15m".into(), &4096.into()));
        // What became resident is what the layout says, and the open pages and whole pages of the
        // system on top.
        let (resident, layout) =
            (number(row, "resident_bytes"), 4096.0 * number(row, "layout_bytes_per_token"));
        assert!(resident > 0.95 * layout, "{row}");
        assert!(resident < 1.05 * layout + f64::from(8 << 20), "{row}");
        assert!((number(row, "bytes_per_token") * 4096.0 - resident).abs() < 4096.0, "{row}");
    }
    assert!(
        number(&rows[1], "layout_bytes_per_token")
            < 0.56 * number(&rows[0], "layout_bytes_per_token")
    );
}

#[test]
fn a_session_is_restored_and_computed() {
    let folder = tempfile::tempdir().unwrap();
    let flags = format!("bench session -p 100 -r 2 --folder {}", folder.path().display());
    let row = words(&format!("{flags} -o json")).json()[0].clone();
    assert_eq!(row["n_restored"], 96);
    for field in ["prefill_ms", "save_ms", "restore_ms", "speedup"] {
        assert!(number(&row, field) > 0.0, "{row}");
    }
    assert!(number(&row, "file_bytes") > 96.0 * 5.0 * 4.0 * 8.0 * 2.0 * 4.0, "{row}");
    assert_eq!(folder.path().read_dir().unwrap().count(), 0);
    words("bench session -p 0").refused_with(2, &["--n-prompt (-p)"]);
    words("bench session -p 513").refused_with(2, &["--n-prompt (-p) is 513", "expected"]);
}
