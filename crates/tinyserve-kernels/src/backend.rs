//! The seam between a model and a device: the operations that a forward pass needs.

mod attention;
mod linear;
mod rows;

use std::fmt;

use tinyserve_kv::{KvFormat, KvLayout, PageCopy, PageId, PagePool, TokenMove};

use crate::{HostTensor, KernelError, TopLogitsArgs};

pub(crate) use attention::rotate_then_append;
pub use attention::{
    AppendKvArgs, AttendArgs, AttendSequence, AttendStats, Attention, Heads, MassArgs, ObserveArgs,
    RotaryAnglesArgs, RotaryArgs, RotateAndAppendArgs,
};
pub use linear::{
    LinearArgs, LinearImage, LinearPart, LinearSize, LinearSpec, MatrixLayout, WeightFormat,
};
pub(crate) use rows::project_step_by_step;
pub use rows::{
    ActivateArgs, Activation, EmbedArgs, NormArgs, NormKind, ProjectActivation, ProjectArgs, Store,
};

/// A device: its memory, and the operations of a forward pass over it.
///
/// Tensors are activations `[rows, columns]` in f32; operations resize their outputs to the rows
/// of their inputs. An operation panics on shapes that do not fit: the model, not the user, made
/// them. What a user or a file can get wrong is refused with a [`KernelError`] when memory is
/// created or weights are loaded.
pub trait Backend: Send + Sized {
    /// Activations `[rows, columns]`, f32.
    type Tensor: Send + fmt::Debug;
    /// A norm's scale or shift `[columns]`.
    type Vector: Send + Sync + fmt::Debug;
    /// Matrices `[out, in]` with biases, or an embedding table.
    type Linear: Send + Sync + fmt::Debug;
    /// The bytes of a page pool.
    type KvPages: Send + fmt::Debug;

    /// An activation tensor of no rows; it grows as operations write it, and never shrinks.
    fn tensor(&self, columns: usize) -> Self::Tensor;

    /// Takes a vector over from a checkpoint.
    ///
    /// # Errors
    /// When the tensor is not one-dimensional, or the device has no memory for it.
    fn load_vector(&self, vector: &HostTensor) -> Result<Self::Vector, KernelError>;

    /// Takes a linear layer over from a checkpoint.
    ///
    /// # Errors
    /// When shapes do not fit each other, or the device has no memory for it.
    fn load_linear(&self, spec: LinearSpec) -> Result<Self::Linear, KernelError>;

    /// Bytes that the weights and biases of a linear layer take.
    fn linear_bytes(&self, linear: &Self::Linear) -> usize;

    /// Names what [`LinearImage::weights`] hold; `None` where a backend makes no images.
    fn image_layout(&self) -> Option<&'static str> {
        None
    }

    /// A quantised layer's content; `None` for weights as they are stored.
    fn linear_image(&self, _linear: &Self::Linear) -> Option<LinearImage> {
        None
    }

    /// Takes over what [`Self::linear_image`] gave. The bytes must be what it gave: sizes are
    /// checked, codes cannot be.
    ///
    /// # Errors
    /// When the sizes do not fit each other, or the backend makes no images.
    fn load_linear_image(&self, _image: LinearImage) -> Result<Self::Linear, KernelError> {
        Err(KernelError::Invalid {
            what: "image of a linear layer",
            found: "a backend that makes none".to_owned(),
            expected: "the backend that made it".to_owned(),
        })
    }

    /// Whether products of bf16 weights, as they are stored, round their inputs to bf16 first.
    fn rounds_inputs(&self) -> bool {
        false
    }

    /// The formats of keys and values that it has: those without codes, unless it says more.
    fn kv_formats(&self) -> &'static [KvFormat] {
        &KvFormat::FLOATS
    }

    /// The formats that it has for open pages where full ones become codes.
    fn open_formats(&self) -> &'static [KvFormat] {
        &[KvFormat::F16]
    }

    /// Memory for `pages` pages, in one of [`Self::kv_formats`] and, where that has codes, of
    /// [`Self::open_formats`].
    ///
    /// # Errors
    /// When the device has no memory for them, or open pages are in a format that it has not.
    fn allocate_pages(&self, layout: KvLayout, pages: usize) -> Result<Self::KvPages, KernelError>;

    /// Copies a page, for copy on write.
    fn copy_page(&self, pages: &mut Self::KvPages, copy: PageCopy);

    /// Lets go of what it keeps, apart from the pages' own places, of pages that nobody holds.
    ///
    /// Called after pages were released. A backend that keeps nothing elsewhere does nothing.
    fn forget_free_pages(&self, _pages: &mut Self::KvPages, _pool: &PagePool) {}

    /// Gives the bytes of full pages to `take`, one after the other, as
    /// [`tinyserve_kv::HostPages::read_page`] has them, whatever the device's own layout is. While
    /// one page is taken, a device copies the next.
    ///
    /// `take` calls no operation of the backend.
    ///
    /// # Errors
    /// When the device fails, or `take` does: no page is taken then any more.
    fn download_pages<E: From<KernelError>>(
        &self,
        pages: &Self::KvPages,
        ids: &[PageId],
        take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E>;

    /// Puts a full page back that [`Self::download_pages`] wrote, here or on another device.
    ///
    /// # Errors
    /// When the device fails; the page is then garbage.
    fn upload_page(
        &self,
        pages: &mut Self::KvPages,
        page: PageId,
        bytes: &[u8],
    ) -> Result<(), KernelError>;

    /// Moves tokens within pages, in order, after some were pruned, and rebuilds the boxes of the
    /// pages that they reach, up to the last token that came: keys, values and boxes of all layers.
    ///
    /// # Errors
    /// When pages of this format cannot be taken apart.
    fn move_tokens(
        &self,
        pages: &mut Self::KvPages,
        moves: &[TokenMove],
    ) -> Result<(), KernelError>;

    /// Looks rows up in an embedding table.
    fn embed(&self, args: EmbedArgs<'_, Self>);

    /// Normalises rows.
    fn norm(&self, args: NormArgs<'_, Self>);

    /// Multiplies by a matrix.
    fn linear(&self, args: LinearArgs<'_, Self>);

    /// Prepares the angles of a step.
    fn rotary_angles(&self, args: RotaryAnglesArgs<'_, Self>);

    /// Rotates queries and keys.
    fn rotary(&self, args: RotaryArgs<'_, Self>);

    /// Writes keys and values into pages.
    fn append_kv(&self, args: AppendKvArgs<'_, Self>);

    /// Rotates queries and keys, and writes keys and values into pages: what [`Self::rotary`] and
    /// [`Self::append_kv`] do, in one pass where a backend can.
    fn rotate_and_append(&self, args: RotateAndAppendArgs<'_, Self>) {
        rotate_then_append(self, args);
    }

    /// Attends over pages.
    ///
    /// # Errors
    /// [`KernelError::Selector`] when a custom selector returns a list that is empty, unsorted or
    /// out of range.
    fn attend(&self, args: AttendArgs<'_, Self>) -> Result<AttendStats, KernelError>;

    /// Applies a feed-forward layer's function.
    fn activate(&self, args: ActivateArgs<'_, Self>);

    /// Normalises rows, multiplies them by a matrix, and applies a feed-forward layer's function:
    /// what [`Self::norm`], [`Self::linear`] and [`Self::activate`] do, in fewer passes where a
    /// backend can.
    fn project(&self, args: ProjectArgs<'_, Self>) {
        project_step_by_step(self, args);
    }

    /// Copies rows of `x` into `out`, in the order of `rows`.
    fn gather_rows(&self, x: &Self::Tensor, rows: &[u32], out: &mut Self::Tensor);

    /// Finds the likeliest tokens of rows of logits, where the logits are: of a large vocabulary
    /// only these come to the host.
    fn top_logits(&self, args: TopLogitsArgs<'_, Self>);

    /// Copies a tensor to the host: `out` becomes `[rows · columns]`.
    fn download(&self, x: &Self::Tensor, out: &mut Vec<f32>);

    /// Fills a tensor from the host; `values` is `[rows · columns]`.
    fn upload(&self, values: &[f32], out: &mut Self::Tensor);

    /// Whether operations are done when they return.
    fn is_synchronous(&self) -> bool {
        true
    }

    /// Tells what went wrong on the device since it was last asked.
    ///
    /// Operations return before a device has run them, so that they cannot tell themselves; what
    /// they wrote is then not defined. Ask after a download. The CPU has nothing to tell.
    ///
    /// # Errors
    /// The first thing that went wrong.
    fn check(&self) -> Result<(), KernelError> {
        Ok(())
    }
}
