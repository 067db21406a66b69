//! `analyze`: a run becomes a trace and one page, and what is no trace is refused.

use std::fs;
use std::io::{Read, Write};

use crate::binary::{text, tinyserve};

#[test]
fn a_run_becomes_a_page_that_needs_nothing_else() {
    let home = tempfile::tempdir().unwrap();
    let [page, again, trace, broken] =
        ["a.html", "b.html", "a.trace", "b.trace"].map(|name| home.path().join(name));
    let story =
        "Once upon a time there was a little girl named Lily. She loved to play. ".repeat(9);
    let args = ["analyze", "-p", &story, "-n", "12", "--policies", "box", "--token-budget", "64"];
    let files = ["--report", text(&page), "--trace", text(&trace), "--dense-layers", "1"];
    let told = tinyserve(&[&args[..], &files].concat()).done();
    assert!(told.contains("a.html") && told.contains("12 steps"), "{told}");

    let html = fs::read_to_string(&page).unwrap();
    for foreign in ["http:", "https:", "src=", "@import"] {
        assert!(!html.contains(foreign), "{foreign}");
    }
    assert!(html.contains("\"policy\":\"box, 64 tokens\""));
    assert!(!html.contains("/*DATA*/null"), "there is data");

    let mut lines = String::new();
    let file = fs::File::open(&trace).unwrap();
    flate2::read::GzDecoder::new(file).read_to_string(&mut lines).unwrap();
    let lines: Vec<serde_json::Value> =
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 13);
    assert_eq!((&lines[0]["format"], &lines[0]["version"]), (&"tinyserve-trace".into(), &2.into()));
    for step in &lines[1..] {
        let heads = step["heads"].as_array().unwrap();
        assert_eq!(heads.len(), 5 * 4);
        for head in heads {
            let mass: Vec<f64> = serde_json::from_value(head["mass"].clone()).unwrap();
            assert_eq!(mass.len(), 2, "query heads of a KV head");
            assert!(mass.iter().all(|x| (0.0..1.0001).contains(x)), "{mass:?}");
            // Each page that was read has a score, and no order of pages holds more than the best.
            let scores = head["scores"].as_array().map(Vec::len);
            assert_eq!(scores, head["pages"].as_array().map(Vec::len), "{head}");
            let curve = |name: &str| serde_json::from_value::<Option<Vec<f64>>>(head[name].clone());
            let (best, scored) = (curve("best_curve").unwrap(), curve("score_curve").unwrap());
            assert_eq!(scored.is_some(), head["layer"] != 0, "a dense layer scores nothing");
            for (best, scored) in best.unwrap().iter().zip(scored.iter().flatten()) {
                assert!(*scored <= best + 1e-3, "{head}");
            }
            // Four pages: the budget.
            let pages = head["pages"].as_array().map(Vec::len);
            assert_eq!(pages, if head["layer"] == 0 { None } else { Some(4) });
        }
    }
    let read = |step: &serde_json::Value| step["bytes_read"].as_f64().unwrap();
    assert!(read(&lines[1]) < 0.8 * lines[1]["bytes_dense"].as_f64().unwrap());

    tinyserve(&["analyze", "--from", text(&trace), "--report", text(&again)]).done();
    assert!(fs::read_to_string(&again).unwrap().contains("\"policy\":\"box, 64 tokens\""));

    // Another version, something else, and a file that ends early.
    let write = |content: &str| {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(content.as_bytes()).unwrap();
        fs::write(&broken, out.finish().unwrap()).unwrap();
    };
    let refused = |words: &[&str]| {
        let stderr = tinyserve(&["analyze", "--from", text(&broken)]).refused(1);
        assert!(words.iter().all(|word| stderr.contains(word)), "{words:?}: {stderr}");
    };
    for other in ["1", "3"] {
        write(&lines[0].to_string().replace("\"version\":2", &format!("\"version\":{other}")));
        let found = format!("a trace of version {other}");
        refused(&["b.trace", &found, "expected a trace of version 2"]);
    }
    write(&lines[0].to_string().replace("\"page_size\":16", "\"page_size\":0"));
    refused(&["b.trace", "pages of 0 tokens"]);
    write("{\"hello\":1}\n");
    refused(&["b.trace", "found something else"]);
    write(&format!("{}\n{{\"tokens\":5}}\n", lines[0]));
    refused(&["b.trace", "in step 0"]);
    let whole = fs::read(&trace).unwrap();
    fs::write(&broken, &whole[..whole.len() / 2]).unwrap();
    refused(&["b.trace", "step"]);
    fs::write(&broken, "no gzip").unwrap();
    refused(&["b.trace"]);
    write(&format!("{}\n", lines[0]));
    let none = tinyserve(&["analyze", "--from", text(&broken)]).refused(1);
    assert!(none.contains("no step"), "{none}");
}

#[test]
fn mistakes_are_sentences() {
    let refused = |args: &[&str], word: &str| {
        let stderr = tinyserve(&[&["analyze"], args].concat()).refused(2);
        assert!(stderr.contains(word), "{word:?} is not in {stderr:?}");
    };
    refused(&[], "--prompt, --prompt-file or --from");
    refused(&["-p", "a", "--policies", "box,random"], "2 policies and budgets are given");
    refused(&["-p", "a", "--policies", "boxes"], "cuboid-mean");
    refused(&["--from", "x.trace", "--policies", "box"], "nothing is run");
    refused(&["-p", "a", "-n", "0"], "--steps is 0");
    refused(&["-p", "a", "-n", "512"], "--steps is 512");
    for flag in ["--report", "--trace"] {
        let nowhere = tinyserve(&["analyze", "-p", "a", flag, "no/such/file"]);
        nowhere.refused_with(1, &["no/such/file cannot be written", "no/such is no folder"]);
    }
}
