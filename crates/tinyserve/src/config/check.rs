//! What settings may be, alone and beside each other.

use std::time::Duration;

use crate::{
    AttentionMode, Device, OpenPageDtype, ScorerName, TinyServeConfig, TinyServeError, Weights,
};

impl TinyServeConfig {
    /// Checks every value that can be checked without a model.
    ///
    /// # Errors
    /// [`TinyServeError::Setting`], naming the first field that is out of its range.
    pub fn check(&self) -> Result<(), TinyServeError> {
        let at_least_one = [
            ("page_size", Some(self.page_size)),
            ("attention_chunk_size", Some(self.attention_chunk_size)),
            ("threads", self.threads),
            ("max_sequence_length", self.max_sequence_length),
            ("replicas", Some(self.replicas)),
            ("num_gpus", self.num_gpus),
            ("max_num_seqs", Some(self.max_num_seqs)),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
        ];
        for (field, value) in at_least_one {
            if value == Some(0) {
                return Err(TinyServeError::Setting {
                    field,
                    found: "0".to_owned(),
                    expected: "at least 1".to_owned(),
                });
            }
        }
        if let Some(folder) = &self.weights_cache
            && !matches!(self.weights, Weights::Int8 | Weights::Int4)
        {
            return Err(TinyServeError::Setting {
                field: "weights_cache",
                found: format!("{} with weights as they are stored", folder.display()),
                expected: "weights int8 or int4: only quantised weights are cached".to_owned(),
            });
        }
        self.check_open_page_dtype()?;
        if let Some(fused) = self.use_fused_kernel.filter(|_| self.cuda_devices().is_empty()) {
            return Err(TinyServeError::Setting {
                field: "use_fused_kernel",
                found: format!("{fused} with device {}", String::from(self.device)),
                expected: "a CUDA device: the CPU has no launches to save".to_owned(),
            });
        }
        if let Some(file) = self.fused_table.as_ref().filter(|_| self.cuda_devices().is_empty()) {
            return Err(TinyServeError::Setting {
                field: "fused_table",
                found: format!("{} with device {}", file.display(), String::from(self.device)),
                expected: "a CUDA device: the CPU has no launches to save".to_owned(),
            });
        }
        if !self.target_latency().is_ok_and(|target| !target.is_zero()) {
            return Err(TinyServeError::Setting {
                field: "target_latency_ms",
                found: self.target_latency_ms.to_string(),
                expected: "a number above 0, and a time that can be told".to_owned(),
            });
        }
        self.check_adaptive()?;
        self.check_gpus()?;
        if self.tensor_parallel_size != 1 {
            return Err(TinyServeError::Setting {
                field: "tensor_parallel_size",
                found: self.tensor_parallel_size.to_string(),
                expected: "1: splitting one model over several devices is not implemented"
                    .to_owned(),
            });
        }
        if let Some(threads) = self.threads.filter(|&threads| threads < self.replicas) {
            return Err(TinyServeError::Setting {
                field: "replicas",
                found: self.replicas.to_string(),
                expected: format!("at most {threads}, the value of threads: each needs one"),
            });
        }
        for (field, seconds) in
            [("priority_ageing", self.priority_ageing), ("session_timeout", self.session_timeout)]
        {
            if Duration::try_from_secs_f64(seconds).is_err() {
                return Err(TinyServeError::Setting {
                    field,
                    found: seconds.to_string(),
                    expected: "seconds, 0 or more".to_owned(),
                });
            }
        }
        self.scheduling().check()?;
        if let Some(gigabytes) = self.target_memory_gb
            && !(gigabytes > 0.0 && gigabytes.is_finite())
        {
            return Err(TinyServeError::Setting {
                field: "target_memory_gb",
                found: gigabytes.to_string(),
                expected: "a number above 0".to_owned(),
            });
        }
        if let Some(share) = self.memory_utilization {
            let expected = match self.target_memory_gb {
                _ if !(share > 0.0 && share <= 1.0) => "a share above 0 and at most 1",
                Some(_) => "none beside target_memory_gb: both say how much memory to take",
                None => "",
            };
            if !expected.is_empty() {
                return Err(TinyServeError::Setting {
                    field: "memory_utilization",
                    found: share.to_string(),
                    expected: expected.to_owned(),
                });
            }
        }
        self.entropy_exit().check()?;
        self.token_pruning().check()?;
        if self.enable_token_pruning
            && self.pruning_ratio > 0.0
            && self.kv_cache_dtype.is_quantised()
        {
            return Err(TinyServeError::Setting {
                field: "kv_cache_dtype",
                found: self.kv_cache_dtype.name().to_owned(),
                expected: "auto, f32, f16 or bf16 where tokens are pruned: codes of a page share \
                           its box"
                    .to_owned(),
            });
        }
        if let Some(scorer) = self.approximate_attention.0 {
            let named = ScorerName(scorer);
            let other = self.scorer != ScorerName::default() && self.scorer != named;
            if self.attention == AttentionMode::Dense || other {
                return Err(TinyServeError::Setting {
                    field: "approximate_attention",
                    found: scorer.name().to_owned(),
                    expected: "off where attention is dense or another scorer is set".to_owned(),
                });
            }
        }
        Ok(self.selection_policy().check()?)
    }

    fn check_open_page_dtype(&self) -> Result<(), TinyServeError> {
        let Some(dtype) = self.open_page_dtype else { return Ok(()) };
        let wrong = |beside: &str, expected: &str| {
            let found = format!("{} with {beside}", dtype.format());
            let expected = expected.to_owned();
            Err(TinyServeError::Setting { field: "open_page_dtype", found, expected })
        };
        if !self.kv_cache_dtype.is_quantised() {
            let expected = "kv_cache_dtype int8 or int4: other pages stay as they are when they \
                            are full";
            return wrong(&format!("kv_cache_dtype {}", self.kv_cache_dtype.name()), expected);
        }
        if dtype == OpenPageDtype::F32 && !self.cuda_devices().is_empty() {
            let expected = "f16 on CUDA devices, whose kernels read open pages in it";
            return wrong("a CUDA device", expected);
        }
        Ok(())
    }

    fn check_gpus(&self) -> Result<(), TinyServeError> {
        let wrong = |field, found: String, expected: String| {
            Err(TinyServeError::Setting { field, found, expected })
        };
        let devices = self.cuda_devices();
        if let Some(ids) = &self.gpu_ids {
            let shown = format!("{ids:?}");
            let twice = |(i, id): (usize, &usize)| ids[..i].contains(id);
            if ids.is_empty() || ids.iter().enumerate().any(twice) {
                return wrong("gpu_ids", shown, "numbers of devices, each once".to_owned());
            }
            if let Some(n) = self.num_gpus.filter(|&n| n != ids.len()) {
                let expected = format!("{n} of them, the value of num_gpus");
                return wrong("gpu_ids", shown, expected);
            }
        }
        let chosen = self.gpu_ids.is_some() || self.num_gpus.is_some();
        // `cuda` alone is `cuda:0`.
        if chosen && !matches!(self.device, Device::Auto | Device::Cuda(0)) {
            let expected = "auto or cuda where num_gpus or gpu_ids name the devices".to_owned();
            return wrong("device", String::from(self.device), expected);
        }
        if !devices.is_empty() && self.replicas > 1 {
            let expected = "1 on CUDA devices: gpu_ids names those that get a copy of the model";
            return wrong("replicas", self.replicas.to_string(), expected.to_owned());
        }
        Ok(())
    }

    fn check_adaptive(&self) -> Result<(), TinyServeError> {
        let wrong = |field, found: String, expected: &str| {
            Err(TinyServeError::Setting { field, found, expected: expected.to_owned() })
        };
        let (min, max) = (self.adaptive_min_budget, self.adaptive_max_budget);
        if !(min > 0.0 && min <= 1.0) {
            return wrong("adaptive_min_budget", min.to_string(), "above 0 and at most 1");
        }
        if !(max >= 1.0 && max.is_finite()) {
            return wrong("adaptive_max_budget", max.to_string(), "a number of at least 1");
        }
        if !self.adaptive {
            return Ok(());
        }
        if self.attention == AttentionMode::Dense {
            let expected = "false with dense attention: there is no selection budget to move";
            return wrong("adaptive", "true".to_owned(), expected);
        }
        let full = self.selection_ratio >= 1.0 && self.token_budget.is_none();
        if min == 1.0 && (max == 1.0 || full && self.top_p_pages.is_none()) {
            let expected = "below 1 with adaptive: these bounds leave no room to move";
            return wrong("adaptive_min_budget", min.to_string(), expected);
        }
        Ok(())
    }
}
