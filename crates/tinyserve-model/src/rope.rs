//! Rotary position embedding: which frequency each pair of channels turns with.

use half::{bf16, f16};
use tinyserve_kernels::DType;

use crate::ModelError;
use crate::json::Fields;

/// θ where a configuration gives none.
const DEFAULT_THETA: f64 = 10_000.0;

/// How positions turn queries and keys.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// How a model was stretched to contexts longer than those it was first trained on.
    pub scaling: RopeScaling,
    /// What the frequencies are rounded to; f32 unless
    /// [`crate::Checkpoint::round_rope_frequencies`] says otherwise.
    pub frequency_dtype: DType,
}

/// How frequencies are scaled.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency is divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// θ grows with contexts above `max_position_embeddings`. Such contexts are refused when a
    /// request is admitted, so the frequencies are always the unscaled ones.
    Dynamic {
        /// At least 1.
        factor: f64,
    },
    /// Low frequencies are divided by `factor`, high ones are kept, those between are blended.
    Llama3 {
        /// At least 1.
        factor: f64,
        /// Frequencies that turn less often than this in the original context are low.
        low_freq_factor: f64,
        /// Frequencies that turn more often than this in the original context are high.
        high_freq_factor: f64,
        /// The context before stretching.
        original_max_position_embeddings: usize,
    },
}

impl RopeConfig {
    /// Reads both spellings: `rope_scaling` beside `rope_theta`, and the newer `rope_parameters`.
    pub(crate) fn from_fields(config: &Fields) -> Result<Self, ModelError> {
        let (old, new) = (config.object("rope_scaling")?, config.object("rope_parameters")?);
        // θ inside an object is more specific than θ beside it.
        let mut theta = None;
        for fields in old.iter().chain(&new).chain([config]) {
            whole_rotation(fields)?;
            if theta.is_none() {
                theta = fields.number("rope_theta", "a number of at least 1", |x| x >= 1.0)?;
            }
        }
        // Where a file has both, the older one is what transformers takes too.
        let scaling = match old.as_ref().or(new.as_ref()) {
            Some(fields) => RopeScaling::from_fields(fields)?,
            None => RopeScaling::None,
        };
        Ok(Self { theta: theta.unwrap_or(DEFAULT_THETA), scaling, frequency_dtype: DType::F32 })
    }

    /// The frequency of each pair of channels, `[head_dim / 2]`.
    ///
    /// Rounded to f32 after every operation, as the reference implementation is: with unrounded
    /// frequencies the angles of late positions drift away from those a model was trained with.
    #[must_use]
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        let theta = self.theta as f32;
        (0..head_dim / 2)
            .map(|pair| {
                let exponent = (2 * pair) as f32 / head_dim as f32;
                let power = f64::from(theta).powf(f64::from(exponent)) as f32;
                let frequency = self.scaling.apply(power.recip());
                match self.frequency_dtype {
                    DType::F32 => frequency,
                    DType::F16 => f16::from_f32(frequency).to_f32(),
                    DType::Bf16 => bf16::from_f32(frequency).to_f32(),
                }
            })
            .collect()
    }
}

impl RopeScaling {
    fn from_fields(fields: &Fields) -> Result<Self, ModelError> {
        // A type of its own for each kind of layer is an object in an object: no LLaMA has it.
        if let Some((name, _)) = fields.iter().find(|(_, value)| value.is_object()) {
            return Err(fields.error(name, "a number or a text, the same for all layers"));
        }
        let name = if fields.get("rope_type").is_some() { "rope_type" } else { "type" };
        let factor = |name: &str| {
            let expected = "a number of at least 1";
            fields.number(name, expected, |x| x >= 1.0)?.ok_or_else(|| fields.error(name, expected))
        };
        match fields.text(name)? {
            // `rope_parameters` may hold θ alone.
            Some("default") => Ok(Self::None),
            None if fields.iter().all(|(name, _)| name == "rope_theta") => Ok(Self::None),
            Some("linear") => Ok(Self::Linear { factor: factor("factor")? }),
            Some("dynamic") => Ok(Self::Dynamic { factor: factor("factor")? }),
            Some("llama3") => {
                let positive = |name: &str| {
                    let expected = "a number above 0";
                    fields
                        .number(name, expected, |x| x > 0.0)?
                        .ok_or_else(|| fields.error(name, expected))
                };
                let low_freq_factor = positive("low_freq_factor")?;
                let high_freq_factor = positive("high_freq_factor")?;
                // As f32, where their difference is what frequencies are blended by.
                if high_freq_factor as f32 <= low_freq_factor as f32 {
                    let expected = format!("a number above low_freq_factor, {low_freq_factor}");
                    return Err(fields.error("high_freq_factor", expected));
                }
                Ok(Self::Llama3 {
                    factor: factor("factor")?,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_position_embeddings: fields
                        .size("original_max_position_embeddings", crate::config::MOST_POSITIONS)?,
                })
            }
            _ => Err(fields.error(name, "\"default\", \"linear\", \"dynamic\" or \"llama3\"")),
        }
    }

    fn apply(self, frequency: f32) -> f32 {
        match self {
            Self::None | Self::Dynamic { .. } => frequency,
            Self::Linear { factor } => frequency / factor as f32,
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let factor = factor as f32;
                let context = original_max_position_embeddings as f64;
                let wavelength = frequency.recip() * std::f32::consts::TAU;
                if wavelength > (context / low_freq_factor) as f32 {
                    frequency / factor
                } else if wavelength < (context / high_freq_factor) as f32 {
                    frequency
                } else {
                    let turns = wavelength.recip() * context as f32;
                    let width = (high_freq_factor - low_freq_factor) as f32;
                    let smooth = (turns - low_freq_factor as f32) / width;
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}

/// Refuses models that turn a part of each head only.
fn whole_rotation(fields: &Fields) -> Result<(), ModelError> {
    let name = "partial_rotary_factor";
    fields.number(name, "1, the whole head", |factor| factor == 1.0)?;
    Ok(())
}
