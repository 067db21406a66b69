//! Up to which size one launch is no slower than several, measured on the device in use.

use std::iter::successors;

use tinyserve_kv::{Budget, KvLayout, KvShape, PagePool, PageTable, Scorer, SelectionPolicy};

use super::attend::{FusedChoice, fused_bytes, has_fused_kernel};
use super::device::driver_error;
use super::{Cuda, CudaPages, CudaTensor};
use crate::{AppendKvArgs, AttendArgs, AttendSequence, Attention, Backend, Heads, KernelError};

/// Layers of a step that is timed: enough that even one launch for each is replayed as a graph, as
/// decode steps are.
const LAYERS: usize = 8;
/// Share of its pages that a step reads.
const SHARE: f64 = 0.25;
/// Tokens of the smallest size.
const FIRST_TOKENS: usize = 1024;
/// Bytes of a KV head that no size goes beyond: several times what launches could save.
const MOST_BYTES: usize = 1 << 20;
/// Bytes of pages that no size goes beyond.
const MOST_PAGE_BYTES: usize = 512 << 20;
/// Steps of each kind that are not counted: the first is launched, the second captured.
const WARM_UPS: usize = 2;
/// Steps of each kind whose median counts.
const TURNS: usize = 9;

/// What a size took in one launch, and in several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FusedTimes {
    /// Bytes of a KV head, as [`FusedRow::most_bytes`](crate::FusedRow::most_bytes) counts them.
    pub bytes: usize,
    /// Nanoseconds of a layer in one launch.
    pub fused_ns: u64,
    /// Nanoseconds of a layer in several.
    pub split_ns: u64,
}

/// The bytes up to which one launch was no slower, of `times` in the order of their bytes; 0 where
/// it was slower from the start.
#[must_use]
pub fn most_fused_bytes(times: &[FusedTimes]) -> usize {
    let faster = times.iter().take_while(|times| times.fused_ns <= times.split_ns);
    faster.last().map_or(0, |times| times.bytes)
}

impl Cuda {
    /// Times decode steps of one sequence that score, select and attend in one launch, and in
    /// several, over pages of `layout`: sizes in ascending order, up to the first at which one launch
    /// is slower. There are none where no kernel does all in one.
    ///
    /// It takes memory of its own and gives it back: pages of at most 512 MiB and a quarter of what
    /// is free, and twice the device's cache.
    /// How this backend chooses stays as it is: see [`Self::use_fused_up_to`].
    ///
    /// # Errors
    /// When there is no memory for the smallest size, or the device fails.
    pub fn time_fused(
        &self,
        layout: &KvLayout,
        heads: Heads,
    ) -> Result<Vec<FusedTimes>, KernelError> {
        if !has_fused_kernel(layout, heads.group()) {
            return Ok(Vec::new());
        }
        let layout = KvLayout::new(KvShape { layers: LAYERS, ..layout.shape() })?;
        let free = self.launcher.context.mem_get_info();
        let (free, _) = free.map_err(driver_error("asking for the memory"))?;
        let room = MOST_PAGE_BYTES.min(free / 4) / layout.bytes_per_page();
        let sizes = sizes(&layout, heads.group(), room);
        let mut steps = Steps::new(self.device.ordinal, layout, heads, &sizes)?;
        let mut all = Vec::new();
        for Size { pages, bytes } in sizes {
            steps.begin(pages);
            let mut turns = [(); 2].map(|()| Vec::with_capacity(TURNS));
            for turn in 0..WARM_UPS + TURNS {
                for fused in [true, false] {
                    let took = steps.time(fused, pages)?;
                    if turn >= WARM_UPS {
                        turns[usize::from(fused)].push(took);
                    }
                }
            }
            let [split_ns, fused_ns] = turns.map(median);
            all.push(FusedTimes { bytes, fused_ns, split_ns });
            if fused_ns > split_ns {
                break;
            }
        }
        Ok(all)
    }
}

/// Pages of a sequence, and their bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Size {
    pages: usize,
    bytes: usize,
}

/// Sizes half as large again each, as far as pages have `room`; at least one.
fn sizes(layout: &KvLayout, group: usize, room: usize) -> Vec<Size> {
    // Of fewer than four pages, a quarter is none.
    let first = layout.pages_for(FIRST_TOKENS).max(4);
    let size = |pages: usize| {
        let budget = Budget::Ratio(SHARE).pages(pages, layout.page_size());
        Size { pages, bytes: fused_bytes(layout, group, pages, budget) }
    };
    successors(Some(first), |pages| Some(pages + pages / 2))
        .map(size)
        .take_while(|size| size.pages == first || size.pages <= room && size.bytes <= MOST_BYTES)
        .collect()
}

fn median(mut times: Vec<u64>) -> u64 {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Decode steps of attention alone, of a sequence of any of some sizes.
struct Steps {
    cuda: Cuda,
    table: PageTable,
    pages: CudaPages,
    heads: Heads,
    qkv: CudaTensor,
    out: CudaTensor,
    policy: SelectionPolicy,
}

impl Steps {
    fn new(
        ordinal: usize,
        layout: KvLayout,
        heads: Heads,
        sizes: &[Size],
    ) -> Result<Self, KernelError> {
        // Buffers that grow with the sizes go with it.
        let cuda = Cuda::new(ordinal)?;
        let most = sizes.iter().map(|size| size.pages).max().unwrap_or(0);
        let mut table = PageTable::new(layout.page_size());
        table.extend(&mut PagePool::new(most)?, most * layout.page_size())?;
        // Zeros: what is read takes as long whatever it says.
        let pages = cuda.allocate_pages(layout, most)?;
        let mut qkv = cuda.tensor(heads.qkv_width());
        cuda.upload(&vec![0.0; heads.qkv_width()], &mut qkv);
        let out = cuda.tensor(heads.q_columns().len());
        let policy = SelectionPolicy {
            scorer: Scorer::BOX,
            budget: Budget::Ratio(SHARE),
            dense_layers: 0,
            min_context: 0,
            ..SelectionPolicy::default()
        };
        Ok(Self { cuda, table, pages, heads, qkv, out, policy })
    }

    /// Appends the first token of the last of `pages`, which is open from then on where others hold
    /// codes.
    fn begin(&mut self, pages: usize) {
        let slots = [self.table.slot((pages - 1) * self.table.page_size())];
        for layer in 0..LAYERS {
            self.cuda.append_kv(AppendKvArgs {
                layer,
                heads: self.heads,
                qkv: &self.qkv,
                slots: &slots,
                pages: &mut self.pages,
            });
        }
    }

    /// Nanoseconds of a layer, in a step of a sequence of so many pages, which has just begun the
    /// last one.
    fn time(&mut self, fused: bool, pages: usize) -> Result<u64, KernelError> {
        self.cuda.fused = FusedChoice { forced: Some(fused), most_bytes: None };
        let sequence = AttendSequence {
            rows: 0..1,
            first_position: (pages - 1) * self.table.page_size(),
            pages: &self.table.pages()[..pages],
            attention: Attention::Policy(&self.policy),
        };
        // What the host lays out is the same for both.
        let ((), time) = self.cuda.time_step(|| {
            (0..LAYERS).try_for_each(|layer| {
                let args = AttendArgs {
                    layer,
                    heads: self.heads,
                    qkv: &self.qkv,
                    scale: 1.0,
                    sequences: std::slice::from_ref(&sequence),
                    pages: &self.pages,
                    measure_recall: false,
                    page_lists: None,
                    sequence_stats: None,
                    observe: None,
                    out: &mut self.out,
                };
                self.cuda.attend(args).map(drop)
            })
        })?;
        Ok(u64::try_from(time.device.as_nanos() / LAYERS as u128).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use tinyserve_kv::KvFormat;

    use super::*;

    #[test]
    fn one_launch_goes_as_far_as_it_is_no_slower() {
        let times = |bytes, fused_ns, split_ns| FusedTimes { bytes, fused_ns, split_ns };
        assert_eq!(most_fused_bytes(&[]), 0);
        assert_eq!(most_fused_bytes(&[times(10, 3, 2)]), 0);
        let all = [times(10, 2, 3), times(20, 3, 3), times(30, 4, 3), times(40, 1, 3)];
        assert_eq!(most_fused_bytes(&all), 20);
        assert_eq!(most_fused_bytes(&all[..2]), 20);
    }

    #[test]
    fn sizes_reach_as_far_as_bytes_and_room() {
        for format in KvFormat::ALL {
            for (kv_heads, head_dim, page_size) in [(8, 128, 16), (32, 128, 16), (1, 8, 4096)] {
                let shape = KvShape { layers: LAYERS, kv_heads, head_dim, page_size, format };
                let layout = KvLayout::new(shape).unwrap();
                let all = sizes(&layout, 4, 1_000_000);
                assert!(all.is_sorted_by(|a, b| a.bytes < b.bytes && a.pages < b.pages));
                assert!(all.len() >= 3, "{shape:?}: {}", all.len());
                let last = all[all.len() - 1].bytes;
                assert!(last <= MOST_BYTES && 3 * last > MOST_BYTES, "{shape:?}: {last}");
                assert_eq!(sizes(&layout, 4, 0), all[..1]);
            }
        }
    }
}
