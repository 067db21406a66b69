//! What is refused, and the sentence that says why.

mod common;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use common::{Cache, Numbers};
use tinyserve_kernels::{
    AttendArgs, AttendSequence, Attention, Backend, Cpu, CpuOptions, CpuPath, DType, Heads,
    HostTensor, LinearPart, LinearSpec, MatrixLayout, WeightFormat,
};
use tinyserve_kv::{KvFormat, KvLayout, KvShape, PageSelector, SelectInput};

struct Fixed(&'static [u32]);

impl PageSelector for Fixed {
    fn select(&self, _: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool {
        selected.extend_from_slice(self.0);
        true
    }
}

#[test]
fn lists_that_attention_cannot_read_are_refused() {
    let heads = Heads { q_heads: 2, kv_heads: 1, head_dim: 4 };
    let shape =
        KvShape { layers: 2, kv_heads: 1, head_dim: 4, page_size: 2, format: KvFormat::F32 };
    let (layout, qkv) = (KvLayout::new(shape).unwrap(), Numbers(1).numbers(5 * heads.qkv_width()));
    for cpu in common::backends(2) {
        let mut cache = Cache::new(heads, layout, &[5]);
        cache.append(&cpu, 0, 0, &qkv);
        let attend = |list: &Fixed| {
            let steps = [(0, 4, 1, Attention::Custom(list))];
            cache.attend(&cpu, &qkv[..heads.qkv_width()], &steps, true)
        };
        for (list, found) in [
            (Fixed(&[]), "an empty list"),
            (Fixed(&[1, 0]), "page 1 before page 0"),
            (Fixed(&[0, 1, 1]), "page 1 before page 1"),
            (Fixed(&[0, 3]), "page 3"),
            (Fixed(&[u32::MAX]), "page 4294967295"),
        ] {
            let error = attend(&list).unwrap_err().to_string();
            let expected = format!("page selector: layer 1, KV head 0: found {found}, expected");
            assert!(error.starts_with(&expected), "{error}");
        }
        // Neither the first nor the newest page has to be in it.
        assert!(attend(&Fixed(&[1])).unwrap().0.iter().all(|x| x.is_finite()));
    }
}

#[test]
fn thread_counts_and_paths_out_of_range_are_refused() {
    for threads in [0, 1_000_000] {
        let error = Cpu::new(CpuOptions { threads: Some(threads), path: None }).unwrap_err();
        assert_eq!(error.to_string(), format!("threads is {threads}, expected 1 to 1024"));
    }
    let error = "sse9".parse::<CpuPath>().unwrap_err().to_string();
    assert_eq!(error, format!(r#"cpu path is "sse9", expected {}"#, CpuPath::NAMES));
    let names = CpuPath::ALL.map(CpuPath::name).join(", ");
    assert_eq!(CpuPath::NAMES.replace(" or ", ", "), names);
    for path in CpuPath::ALL {
        assert_eq!(path.to_string().parse(), Ok(path));
        let made = Cpu::new(CpuOptions { threads: Some(2), path: Some(path) });
        match made {
            Ok(cpu) => assert!(path.is_available() && cpu.path() == path),
            Err(error) => {
                assert!(!path.is_available());
                assert!(error.to_string().contains("this processor does not have"), "{error}");
            }
        }
    }
    // What rounds is for whoever asks for it.
    assert!(!CpuPath::detect().rounds_inputs());
    let cpu = Cpu::new(CpuOptions { threads: Some(3), path: Some(CpuPath::Portable) }).unwrap();
    assert_eq!(cpu.threads(), 3);
    assert_eq!((Cpu::reference().threads(), Cpu::reference().path()), (1, CpuPath::Scalar));
}

#[test]
fn weights_that_do_not_fit_are_refused() {
    let tensor = |name: &str, shape: &[usize]| {
        HostTensor::from_f32(name, vec![0.5; shape.iter().product()], shape).unwrap()
    };
    let part = |weight: &HostTensor, bias: Option<&HostTensor>| LinearPart {
        weight: weight.clone(),
        bias: bias.cloned(),
    };
    let cpu = Cpu::reference();
    let (w, b) = (tensor("w", &[4, 3]), tensor("b", &[4]));
    let refused = |parts: Vec<LinearPart>, layout| {
        cpu.load_linear(LinearSpec { parts, layout, format: WeightFormat::Stored })
            .unwrap_err()
            .to_string()
    };
    let out_in = MatrixLayout::OutIn;
    assert_eq!(
        refused(vec![part(&w, Some(&tensor("b", &[3])))], out_in),
        r#"tensor "b": shape [3], expected [4], one per output"#
    );
    assert_eq!(
        refused(vec![part(&w, Some(&b))], MatrixLayout::InOut),
        r#"tensor "b": shape [4], expected [3], one per output"#
    );
    assert_eq!(
        refused(vec![part(&w, None), part(&tensor("v", &[4, 2]), None)], out_in),
        r#"tensor "v": shape [4, 2], expected an input width of 3, as beside it"#
    );
    assert_eq!(
        refused(vec![part(&b, None)], out_in),
        r#"tensor "b": shape [4], expected two dimensions"#
    );
    assert_eq!(
        refused(vec![part(&tensor("e", &[0, 3]), None)], out_in),
        r#"tensor "e": shape [0, 3], expected no dimension of 0"#
    );
    assert_eq!(refused(vec![], out_in), "parts of a linear layer is 0, expected at least 1");
    assert_eq!(
        cpu.load_vector(&w).unwrap_err().to_string(),
        r#"tensor "w": shape [4, 3], expected one dimension"#
    );
    for (bytes, shape) in [(7, vec![2usize, 2]), (8, vec![3]), (8, vec![usize::MAX, 2])] {
        let error = HostTensor::new("t", vec![0u8; bytes].into(), DType::F16, &shape).unwrap_err();
        assert!(error.to_string().starts_with(r#"tensor "t": shape ["#), "{error}");
    }
}

#[test]
fn rows_that_two_sequences_claim_are_refused() {
    let heads = Heads { q_heads: 2, kv_heads: 2, head_dim: 16 };
    let shape =
        KvShape { layers: 2, kv_heads: 2, head_dim: 16, page_size: 16, format: KvFormat::F32 };
    let (layout, tokens) = (KvLayout::new(shape).unwrap(), 300);
    let qkv = Numbers(2).numbers(tokens * heads.qkv_width());
    for cpu in common::backends(2) {
        let mut cache = Cache::new(heads, layout, &[tokens]);
        cache.append(&cpu, 0, 0, &qkv);
        let (mut rows, mut out) = (cpu.tensor(heads.qkv_width()), cpu.tensor(32));
        cpu.upload(&qkv, &mut rows);
        let mut attend = |ranges: [Range<usize>; 2]| {
            let sequences = ranges.map(|rows| AttendSequence {
                rows,
                first_position: 0,
                pages: cache.tables[0].pages(),
                attention: Attention::Dense,
            });
            let args = AttendArgs {
                layer: common::LAYER,
                heads,
                qkv: &rows,
                scale: cache.scale(),
                sequences: &sequences,
                pages: &cache.pages,
                measure_recall: false,
                page_lists: None,
                sequence_stats: None,
                observe: None,
                out: &mut out,
            };
            catch_unwind(AssertUnwindSafe(|| cpu.attend(args)))
        };
        // Two threads would write the same numbers at the same time.
        for ranges in [[0..300, 0..300], [0..200, 199..300], [299..300, 0..300]] {
            assert!(attend(ranges.clone()).is_err(), "{} {ranges:?}", cpu.path());
        }
        assert!(attend([0..300, 300..301]).is_err(), "there are 300 rows");
        // Their order does not matter.
        for ranges in [[0..200, 200..300], [200..300, 0..200], [0..300, 300..300]] {
            assert!(attend(ranges.clone()).is_ok(), "{} {ranges:?}", cpu.path());
        }
    }
}
