//! What open pages are stored in, where full ones become codes.

use crate::binary::{Ran, command, text, tinyserve, words};

const RUN: &str = "run -p Once -n 60 --temperature 0 --page-size 8 --ignore-eos --json";

#[test]
fn open_pages_in_f32_are_computed_the_same_way_on_every_path() {
    for format in ["int8", "int4"] {
        let run = |more: &str| {
            let flags = format!("--kv-cache-dtype {format} --open-page-dtype f32");
            words(&format!("{RUN} {flags} {more}")).json()
        };
        let found = run("");
        assert_eq!(found["tokens"].as_array().unwrap().len(), 60);
        for path in ["--cpu scalar", "--cpu portable", "--threads 2"] {
            let other = run(path);
            assert_eq!(other["tokens"], found["tokens"], "{format} {path}");
            assert_eq!(other["kv"]["bytes_read"], found["kv"]["bytes_read"], "{format} {path}");
        }
    }
}

#[test]
fn they_take_twice_the_memory_of_open_pages_in_f16() {
    let inspect = |more: &str| {
        let command = format!("inspect --json --target-memory-gb 0.5 --kv-cache-dtype int8 {more}");
        words(&command).json()["memory"].clone()
    };
    let [plain, narrow, wide] = ["", "--open-page-dtype f16", "--open-page-dtype f32"].map(inspect);
    let size = |plan: &serde_json::Value, name: &str| plan[name].as_u64().unwrap();
    let open = |plan| size(plan, "open_bytes");
    assert_eq!(open(&narrow), open(&plain));
    assert_eq!(open(&wide), 2 * open(&plain));
    // The pages have what is left of the target. What the process takes is measured anew by each
    // run, so that the pages of two runs can't be compared.
    for plan in [&plain, &narrow, &wide] {
        let page = (size(plan, "kv_bytes") + size(plan, "box_bytes")) / size(plan, "pages");
        let fixed = ["process_bytes", "weight_bytes", "scratch_bytes", "open_bytes"];
        let fixed: u64 = fixed.into_iter().map(|name| size(plan, name)).sum();
        assert_eq!(size(plan, "pages_that_fit"), (size(plan, "target_bytes") - fixed) / page);
    }
    // What the table says of the format that was asked for is what the plan says.
    let of_int8 = wide["formats"].as_array().unwrap();
    let of_int8 = of_int8.iter().find(|row| row["kv_cache_dtype"] == "int8").unwrap();
    assert_eq!(of_int8["tokens_that_fit"], wide["tokens_that_fit"]);
    let ran = words("run -p Once -n 2 -v --kv-cache-dtype int4 --open-page-dtype f32");
    for part in ["f32 until they are full", "\"open_page_dtype\":\"f32\""] {
        assert!(ran.stderr.contains(part), "{part:?} is not in {ran:?}");
    }
    let mut command = command(&["run", "-p", "Once", "-n", "2", "-v", "--kv-cache-dtype", "int8"]);
    let ran = Ran::new(command.env("TINYSERVE_OPEN_PAGE_DTYPE", "f32").output().unwrap());
    assert!(ran.stderr.contains("f32 until they are full"), "{ran:?}");
}

#[test]
fn a_session_is_restored_whatever_open_pages_are_in() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("story.session");
    let prompt = "Once upon a time there was a little girl who went to the park with her dog. ";
    let run = |open: &str, flag: &str| {
        let args = ["run", "-p", prompt, "-n", "20", "--temperature", "0", "--page-size", "8"];
        let codes = ["--kv-cache-dtype", "int8", "--open-page-dtype", open, "--json"];
        tinyserve(&[&args[..], &codes, &[flag, text(&file)]].concat()).json()
    };
    for (saved, restored) in [("f32", "f16"), ("f16", "f32"), ("f32", "f32")] {
        let first = run(saved, "--save-session");
        let second = run(restored, "--load-session");
        let cached = second["cached_tokens"].as_u64().unwrap();
        assert!(cached >= 16 && cached.is_multiple_of(8), "{cached} tokens are cached");
        if saved == restored {
            assert_eq!(second["tokens"], first["tokens"]);
        }
    }
}

#[test]
fn where_no_page_becomes_codes_and_on_cuda_it_is_refused() {
    let floats = [
        "--open-page-dtype is f32 with kv_cache_dtype auto",
        "expected kv_cache_dtype int8 or int4: other pages stay as they are when they are full",
    ];
    for command in ["run -p a", "bench latency -p 8 -n 1", "inspect", "serve"] {
        words(&format!("{command} --open-page-dtype f32")).refused_with(2, &floats);
    }
    words("run -p a --open-page-dtype f16 --kv-cache-dtype f16")
        .refused_with(2, &["--open-page-dtype is f16 with kv_cache_dtype f16"]);
    words("run -p a --open-page-dtype f32 --kv-cache-dtype int8 --device cuda")
        .refused_with(2, &["--open-page-dtype is f32 with a CUDA device", "expected f16 on CUDA"]);
    let other = words("run -p a --open-page-dtype bf16 --kv-cache-dtype int8").refused(2);
    assert!(other.contains("'--open-page-dtype <DTYPE>': expected f16 or f32"), "{other}");
}
