//! Tensors from files: bytes that lie anywhere, lengths and shapes that lie.

use bytes::Bytes;
use half::{bf16, f16};
use tinyserve_kernels::{DType, HostTensor};

#[test]
fn bytes_are_read_wherever_they_lie() {
    let values = [1.0f32, -2.5, 0.0, 65_504.0, 0.125, -3.0];
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let stored: Vec<u8> = match dtype {
            DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DType::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            DType::Bf16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        };
        let expected: Vec<f32> = match dtype {
            DType::Bf16 => values.iter().map(|&x| bf16::from_f32(x).to_f32()).collect(),
            DType::F32 | DType::F16 => values.to_vec(),
        };
        // A file's header has any length: the tensor begins at every offset from a word.
        for offset in 0..8 {
            let file: Bytes = [vec![0xff; offset], stored.clone(), vec![0xff; 3]].concat().into();
            let bytes = file.slice(offset..offset + stored.len());
            let lies_well = bytes.as_ptr().addr().is_multiple_of(dtype.size());
            let tensor = HostTensor::new("w", bytes.clone(), dtype, &[2, 3]).unwrap();
            assert!(tensor.bytes().as_ptr().addr().is_multiple_of(dtype.size()), "{dtype}");
            assert_eq!(tensor.bytes(), stored, "{dtype} at {offset}");
            assert_eq!(tensor.to_f32(0..6), expected, "{dtype} at {offset}");
            assert_eq!(tensor.to_f32(2..4), expected[2..4], "{dtype} at {offset}");
            // What lies well is not copied: a mapped file stays a mapped file.
            assert_eq!(tensor.bytes().as_ptr() == bytes.as_ptr(), lies_well, "{dtype} {offset}");
            assert_eq!((tensor.len(), tensor.shape()), (6, &[2, 3][..]));
            assert_eq!(tensor.clone().bytes().as_ptr(), tensor.bytes().as_ptr(), "shared");
        }
    }
}

#[test]
fn shapes_that_do_not_fill_their_bytes_are_refused() {
    let new = |bytes: usize, dtype, shape: &[usize]| {
        HostTensor::new("h.0.w", vec![0u8; bytes].into(), dtype, shape).map_err(|e| e.to_string())
    };
    assert_eq!(
        new(7, DType::F16, &[2, 2]).unwrap_err(),
        r#"tensor "h.0.w": shape [2, 2], expected a shape that fills its 7 bytes of f16"#
    );
    assert!(new(16, DType::F16, &[2, 2]).is_err(), "too many");
    assert!(new(8, DType::F32, &[2, 2]).is_err(), "the bytes of another type");
    // Products that come out right only because they overflow.
    for shape in [&[usize::MAX, 2][..], &[1 << 32, 1 << 32], &[1 << 62, 4], &[1 << 63, 1]] {
        for bytes in [0, 8] {
            assert!(new(bytes, DType::F32, shape).is_err(), "{shape:?} of {bytes} bytes");
        }
    }
    assert!(HostTensor::from_f32("b", vec![0.0; 3], &[4]).is_err());
    // A scalar and nothing at all are shapes too.
    assert_eq!(new(4, DType::F32, &[]).unwrap().len(), 1);
    assert!(new(0, DType::Bf16, &[0, 5]).unwrap().is_empty());
}
