//! The binary on a CUDA device: the emulator's, which describes itself and fails as it is asked to.

use serde_json::Value;
use tinyserve_cuda_emulator::{Build, cublas_folder, folder};

use crate::binary::{Ran, command, words};

/// Runs with `args` split at spaces, on the emulator with `settings` in its environment; `None`,
/// with the reason on stderr, where there is no C++ compiler.
fn emulated(args: &str, settings: &[(&str, &str)]) -> Option<Ran> {
    let driver = match folder(Build::Plain) {
        Ok(driver) => driver,
        Err(reason) => {
            eprintln!("skipped: {reason}");
            return None;
        }
    };
    let mut command = command(&args.split_whitespace().collect::<Vec<_>>());
    command.env("LD_LIBRARY_PATH", driver).envs(settings.iter().copied());
    Some(Ran::new(command.output().expect("the binary runs")))
}

const RUN: &str = "run --device cuda -p Once -n 4 --temperature 0 --max-sequence-length 64 --json";

#[test]
fn text_is_what_it_is_on_the_cpu_in_every_cache_format() {
    for format in ["f32", "int8", "int4"] {
        let args = format!("{RUN} --kv-cache-dtype {format} --page-size 4 --ignore-eos");
        let Some(ran) = emulated(&args, &[]) else { return };
        let cpu = words(&args.replace("--device cuda", "--device cpu")).json();
        let cuda = ran.json();
        assert_eq!(cuda["tokens"], cpu["tokens"], "{format}");
        assert_eq!(cuda["kv"]["pages"], cpu["kv"]["pages"], "{format}");
    }
}

#[test]
fn one_launch_or_several_give_the_same_text() {
    let prompt = "Once,upon,a,time,there,was,a,girl,named,Lily";
    let select =
        "--attention sparse --dense-layers 0 --sink-pages 0 --recent-pages 1 --page-size 4";
    let args = format!("{} {select} --ignore-eos", RUN.replace("Once", prompt));
    let fused = format!("{args} --use-fused-kernel true");
    let Some(one) = emulated(&fused, &[]) else { return };
    let one = one.json();
    let Some(several) = emulated(&args, &[("TINYSERVE_USE_FUSED_KERNEL", "false")]) else { return };
    let several = several.json();
    assert_eq!(one["tokens"], several["tokens"]);
    assert_eq!(one["kv"]["bytes_read"], several["kv"]["bytes_read"]);
    // A kernel that fails shows that it was launched.
    let fails = [("CUDA_EMULATOR_FAIL", "fused_decode_f32_4")];
    let Some(ran) = emulated(&fused, &fails) else { return };
    ran.refused_with(1, &["kernel fused_decode_f32_4"]);
    let Some(ran) = emulated(&format!("{args} --use-fused-kernel false"), &fails) else { return };
    ran.done();
    words("run -p Once --use-fused-kernel").refused_with(2, &["--use-fused-kernel", "CUDA device"]);
}

#[test]
fn benchmarks_run_on_it() {
    let bench = "bench attention --device cuda -o json -r 1 --warm-ups 0 --layers 1 --tokens 64";
    let Some(ran) = emulated(&format!("{bench} --q-heads 4 --kv-heads 2"), &[]) else { return };
    let rows = ran.json();
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 3);
    for row in rows {
        assert_eq!((&row["device"], &row["cpu_path"]), (&"cuda:0".into(), &Value::Null));
        assert!(row["median_ns"].as_f64() > Some(0.0), "{row}");
        assert!(row["clock"] == "device" && row["host_ns"].as_f64() > Some(0.0), "{row}");
        assert!(row["read_bandwidth_gb_s"].as_f64() > Some(0.0), "{row}");
    }
    let bench = "bench latency --device cuda -o json -r 1 -p 8 -n 2";
    let Some(ran) = emulated(bench, &[]) else { return };
    let rows = ran.json();
    assert_eq!(rows.as_array().unwrap().len(), 2);
    for row in rows.as_array().unwrap() {
        assert_eq!(row["device"], "cuda:0");
        assert!(row["avg_ts"].as_f64() > Some(0.0), "{row}");
    }
    // What is planned is what the device has to have, and not three times as much.
    let planned = rows[0]["planned_bytes"].as_u64().unwrap();
    let with = |bytes: u64| emulated(bench, &[("CUDA_EMULATOR_MEMORY", &bytes.to_string())]);
    with(planned).unwrap().done();
    with(planned / 3).unwrap().refused_with(1, &["no memory for"]);
}

#[test]
fn what_is_missing_is_said_with_what_to_do() {
    for (setting, value, expected) in [
        ("CUDA_EMULATOR_DEVICES", "0", ["no CUDA device", "nvidia-smi", "--device cpu"]),
        ("CUDA_EMULATOR_DRIVER", "11040", ["CUDA 11.4", "12.0 or later", "update"]),
        ("CUDA_EMULATOR_CAPABILITY", "75", ["cuda:0", "capability 7.5", "8.0"]),
        (
            "CUDA_EMULATOR_FAIL",
            "rotary_angles",
            ["kernel rotary_angles", "grid", "OUT_OF_RESOURCES"],
        ),
    ] {
        let Some(ran) = emulated(RUN, &[(setting, value)]) else { return };
        ran.refused_with(1, &expected);
    }
    let Some(ran) = emulated(&RUN.replace("cuda", "cuda:3"), &[]) else { return };
    ran.refused_with(1, &["cuda:3 does not exist", "cuda:0"]);
}

#[test]
fn a_device_without_room_is_refused_with_what_to_lower() {
    let memory = [("CUDA_EMULATOR_MEMORY", "1500000")];
    let Some(ran) = emulated(RUN, &memory) else { return };
    let stderr = ran.refused(1);
    assert!(stderr.contains("max_sequence_length") || stderr.contains("target_memory_gb"));
    // A target above what there is finds out when it asks for it.
    let args = format!("{RUN} --target-memory-gb 1");
    let Some(ran) = emulated(&args, &memory) else { return };
    ran.refused_with(1, &["no memory for", "bytes asked for", "free", "--kv-cache-dtype"]);
}

#[test]
fn a_machine_without_a_driver_says_so() {
    if std::path::Path::new("/dev/nvidiactl").exists() {
        return;
    }
    words(RUN).refused_with(1, &["no CUDA driver", "libcuda", "--device cpu"]);
    words("doctor --self-test --device cuda --json").refused_with(1, &["no CUDA driver"]);
    for bench in ["attention", "latency"] {
        words(&format!("bench {bench} --device cuda")).refused_with(1, &["no CUDA driver"]);
    }
}

/// Every kernel against the reference, through the real binary and the real bindings.
#[test]
fn the_self_test_holds_every_kernel_to_the_reference() {
    let args = "doctor --self-test --device cuda --json";
    let spoiled = [("CUDA_EMULATOR_SKIP", "top_logits_merge")];
    // Side by side: the emulator takes its time.
    let (whole, spoiled) = std::thread::scope(|scope| {
        let whole = scope.spawn(|| emulated(args, &[]));
        let spoiled = emulated(args, &spoiled);
        (whole.join(), spoiled)
    });
    let Some(ran) = whole.expect("a thread that runs the binary") else { return };
    let report = &ran.json()["self_test"];
    assert_eq!(report.as_array().map(Vec::len), Some(1));
    let report = &report[0];
    assert_eq!((&report["path"], &report["passed"]), (&"cuda:0".into(), &true.into()));
    let ops = report["ops"].as_array().unwrap();
    let named = |name: &str| ops.iter().any(|op| op["op"] == name);
    for name in ["linear", "append_kv and attend", "select and attend", "top_logits"] {
        assert!(named(name), "{name} is missing");
    }
    for op in ops {
        assert!(op["cases"].as_u64() > Some(0) && op["failed"] == serde_json::json!([]), "{op}");
    }
    for moved in ["copy", "gemv f16", "dense attention", "sparse attention"] {
        assert!(report["bandwidth_gb_s"][moved].as_f64() > Some(0.0), "{moved}: {report}");
    }
    // A kernel that does nothing is a mismatch.
    let Some(ran) = spoiled else { return };
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    let object: Value = serde_json::from_str(&ran.stdout).unwrap();
    let report = &object["self_test"][0];
    assert_eq!(report["passed"], false);
    for op in report["ops"].as_array().unwrap() {
        let failed = op["failed"].as_array().unwrap();
        assert_eq!(failed.is_empty(), op["op"] != "top_logits", "{op}");
    }
}

#[test]
fn doctor_describes_the_device() {
    let Some(ran) = emulated("doctor --json", &[("CUDA_EMULATOR_DEVICES", "2")]) else { return };
    let object = ran.json();
    let devices = object["gpus"].as_array().unwrap();
    assert_eq!(devices.len(), 2);
    assert_eq!(devices[1]["device"], "cuda:1");
    assert_eq!(devices[0]["compute_capability"], "9.0");
    assert_eq!(devices[0]["unusable"], Value::Null);
    let table = object["fused_kernel"]["table"].as_array().unwrap();
    assert!(!table.is_empty() && table.iter().all(|row| row["most_bytes"].is_u64()), "{table:?}");
    let source = object["fused_kernel"]["source"].as_str().unwrap();
    assert!(source.contains("measured on an NVIDIA H200"), "{source}");
    let cublas = cublas_folder(Build::Plain).unwrap();
    let path = format!("{}:{}", folder(Build::Plain).unwrap().display(), cublas.display());
    let Some(ran) = emulated("doctor --json", &[("LD_LIBRARY_PATH", &path)]) else { return };
    assert_eq!(ran.json()["cublas"]["version"], "12.0.0");
    let old = [("CUDA_EMULATOR_CAPABILITY", "75")];
    let Some(ran) = emulated("doctor", &old) else { return };
    assert!(ran.done().contains("capability 7.5, expected 8.0"));
}

/// Launches overlap where device and driver know how, and give the same where they do not.
#[test]
fn older_devices_and_drivers_launch_one_after_the_other() {
    let Some(newest) = emulated(RUN, &[]) else { return };
    let tokens = &newest.json()["tokens"];
    for (older, overlaps) in [
        (vec![], true),
        (vec![("CUDA_EMULATOR_CAPABILITY", "80")], false),
        (vec![("CUDA_EMULATOR_DRIVER", "12020")], false),
    ] {
        let Some(ran) = emulated("doctor --json", &older) else { return };
        assert_eq!(ran.json()["gpus"][0]["overlaps_launches"], overlaps, "{older:?}");
        let Some(ran) = emulated(RUN, &older) else { return };
        assert_eq!(&ran.json()["tokens"], tokens, "{older:?}");
    }
}

/// A start measures what the file lacks; the next one does as the file says, whatever it says.
#[test]
fn what_was_measured_decides_from_then_on() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("fused.json");
    let prompt = "Once,upon,a,time,there,was,a,girl,named,Lily";
    let select =
        "--attention sparse --dense-layers 0 --sink-pages 0 --recent-pages 1 --page-size 4";
    let args = format!(
        "{} {select} --ignore-eos --fused-table {}",
        RUN.replace("Once", prompt),
        file.display()
    );
    let Some(first) = emulated(&args, &[]) else { return };
    let first = first.json();
    let written = std::fs::read_to_string(&file).unwrap();
    let mut table: Value = serde_json::from_str(&written).unwrap();
    assert_eq!(table["rows"].as_array().map(Vec::len), Some(1), "{written}");
    let row = &table["rows"][0];
    for (key, value) in [("kv_cache_dtype", "f32".into()), ("page_size", 4.into())] {
        assert_eq!(row[key], Value::clone(&value), "{written}");
    }
    let bytes = |time: &Value| time["bytes"].as_u64();
    let times = row["times"].as_array().unwrap();
    assert!(!times.is_empty() && times.is_sorted_by(|a, b| bytes(a) < bytes(b)), "{written}");
    let again = emulated(&args, &[]).unwrap().json();
    assert_eq!((&again["tokens"], &again["text"]), (&first["tokens"], &first["text"]));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), written);
    // Another shape joins it, and the first stays.
    emulated(&args.replace("--page-size 4", "--page-size 8"), &[]).unwrap().done();
    let both: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(both["rows"].as_array().map(Vec::len), Some(2), "{both}");
    assert_eq!(both["rows"][0], table["rows"][0]);
    let doctor = format!("doctor --fused-table {}", file.display());
    let shown = emulated(&format!("{doctor} --json"), &[]).unwrap().json();
    let shown = &shown["fused_kernel"];
    assert_eq!(shown["table"][1]["times"], both["rows"][1]["times"]);
    assert!(shown["source"].as_str().unwrap().contains("measured, in"), "{shown}");
    // A kernel that fails shows that it was launched.
    let fails = [("CUDA_EMULATOR_FAIL", "fused_decode_f32_4")];
    for (most, expected) in [(0u64, 0), (1 << 40, 1)] {
        let time = serde_json::json!({ "bytes": most.max(1), "fused_ns": 2, "split_ns": 1 + 2 * expected });
        table["rows"][0]["times"] = serde_json::json!([time]);
        std::fs::write(&file, table.to_string()).unwrap();
        let ran = emulated(&args, &fails).unwrap();
        assert_eq!(ran.code, Some(expected), "{}", ran.stderr);
        let shown = emulated(&doctor, &[]).unwrap().done();
        let said = if expected == 0 { "than 0 B on CUDA emulator" } else { "than 1.00 TiB on" };
        assert!(shown.contains(said), "{shown}");
    }
    let forced = format!("{args} --use-fused-kernel false");
    emulated(&forced, &fails).unwrap().done();
    // What it does not understand it refuses, and leaves alone.
    for (text, expected) in
        [("{\"version\": 2}", "a table of version 2"), ("{\"version\": 1}", "missing field `rows`")]
    {
        std::fs::write(&file, text).unwrap();
        for args in [&args, &doctor] {
            let ran = emulated(args, &[]).unwrap();
            ran.refused_with(2, &["--fused-table is", "fused.json", expected, "version 1"]);
        }
        assert_eq!(std::fs::read_to_string(&file).unwrap(), text);
    }
    let nowhere = args.replace("fused.json", "missing/fused.json");
    emulated(&nowhere, &[]).unwrap().refused_with(1, &["missing/fused.json"]);
    words("run -p Once --fused-table x.json").refused_with(2, &["--fused-table", "CUDA device"]);
}
