//! How an engine is put together: settings, a checkpoint, a device, the scheduler.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use tinyserve_kernels::{Backend, Cpu, CpuOptions, Cuda};
use tinyserve_kv::{PageSelector, PrefixIndex, PrefixOptions};
use tinyserve_model::{CacheOutcome, Checkpoint, KvCache, LoadOptions, MemoryPlan, Model};
use tinyserve_plugins::PluginManager;
use tinyserve_sched::{
    Adaptive, AttentionChoice, BudgetMove, Engine, EngineConfig, ModelRunner, OnStart,
};

use super::TinyServe;
use crate::affinity::Pinning;
use crate::{
    AttentionMode, PlannedMemory, RopeFrequencyDtype, TinyServeConfig, TinyServeError, Weights,
};

/// Collects settings and builds a [`TinyServe`].
#[derive(Default)]
pub struct TinyServeBuilder {
    config: TinyServeConfig,
    selector: Option<Arc<dyn PageSelector>>,
    checkpoint: Option<Checkpoint>,
    plugins: PluginManager,
    cpu: CpuOptions,
    on_budget_move: Option<OnBudgetMove>,
}

/// Is told how the selection budget moves.
type OnBudgetMove = Arc<dyn Fn(&BudgetMove) + Send + Sync>;

impl TinyServeBuilder {
    /// Replaces all settings.
    #[must_use]
    pub fn config(mut self, config: TinyServeConfig) -> Self {
        self.config = config;
        self
    }

    /// A folder in Hugging Face layout, or `builtin:stories260k`.
    #[must_use]
    pub fn model(mut self, model: impl Into<String>) -> Self {
        self.config.model = model.into();
        self
    }

    /// Tokens of one page.
    #[must_use]
    pub fn page_size(mut self, page_size: usize) -> Self {
        self.config.page_size = page_size;
        self
    }

    /// When decode steps select pages.
    #[must_use]
    pub fn attention(mut self, attention: AttentionMode) -> Self {
        self.config.attention = attention;
        self
    }

    /// Share of the pages that a selecting step reads.
    #[must_use]
    pub fn selection_ratio(mut self, ratio: f64) -> Self {
        self.config.selection_ratio = ratio;
        self
    }

    /// Tokens that a selecting step reads, instead of a share.
    #[must_use]
    pub fn token_budget(mut self, tokens: usize) -> Self {
        self.config.token_budget = Some(tokens);
        self
    }

    /// Threads of the CPU.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.config.threads = Some(threads);
        self
    }

    /// How weights are kept in memory.
    #[must_use]
    pub fn weights(mut self, weights: Weights) -> Self {
        self.config.weights = weights;
        self
    }

    /// Which of the CPU's instruction sets to use, instead of the best.
    #[must_use]
    pub fn cpu_path(mut self, path: tinyserve_kernels::CpuPath) -> Self {
        self.cpu.path = Some(path);
        self
    }

    /// Called for every move that `adaptive` makes, on the thread of the engine that makes it: an
    /// engine that is told nothing moves its budget in silence.
    #[must_use]
    pub fn on_budget_move(mut self, tell: impl Fn(&BudgetMove) + Send + Sync + 'static) -> Self {
        self.on_budget_move = Some(Arc::new(tell));
        self
    }

    /// A page selector of your own in place of the policy that the settings describe.
    #[must_use]
    pub fn selector(mut self, selector: Arc<dyn PageSelector>) -> Self {
        self.selector = Some(selector);
        self
    }

    /// Plugins of your own; the built-in ones are registered beside them.
    #[must_use]
    pub fn plugins(mut self, plugins: PluginManager) -> Self {
        self.plugins = plugins;
        self
    }

    /// Folder in which quantised weights are kept from one start to the next.
    #[must_use]
    pub fn weights_cache(mut self, folder: impl Into<PathBuf>) -> Self {
        self.config.weights_cache = Some(folder.into());
        self
    }

    /// A checkpoint that is open already, in place of the one that `model` names.
    #[must_use]
    pub fn checkpoint(mut self, checkpoint: Checkpoint) -> Self {
        self.checkpoint = Some(checkpoint);
        self
    }

    /// Loads the model.
    ///
    /// # Errors
    /// When a setting is out of its range or the checkpoint cannot be used.
    pub fn build(self) -> Result<TinyServe, TinyServeError> {
        self.build_with_progress(|_, _| {})
    }

    /// Loads the model; `progress` is told layers done and layers in all.
    ///
    /// # Errors
    /// As [`Self::build`].
    pub fn build_with_progress(
        self,
        progress: impl FnMut(usize, usize),
    ) -> Result<TinyServe, TinyServeError> {
        let start = Instant::now();
        let config = self.config;
        config.check()?;
        // Opened before anything is read: a device that is not there is told at once.
        let devices = config.cuda_devices();
        let cudas = devices.into_iter().map(Cuda::new).collect::<Result<Vec<_>, _>>()?;
        let replicas = config.replicas;
        let threads = config.threads.or_else(|| {
            let all = std::thread::available_parallelism().map_or(1, usize::from);
            (replicas > 1).then_some(all)
        });
        let threads = threads.map(|all| (all / replicas).max(1));
        let pinning = threads.and_then(|threads| Pinning::plan(replicas, threads));
        let options = CpuOptions { threads, ..self.cpu };
        let backends = (0..replicas).map(|replica| pinned_cpu(options, replica, pinning.as_ref()));
        let backends = backends.collect::<Result<Vec<_>, _>>()?;
        let (path, threads) = (backends[0].path(), backends[0].threads());
        let backend_name = match (&cudas[..], replicas) {
            ([], 1) => format!("CPU, {path}, {threads} threads"),
            ([], _) => {
                let pinned = pinning.as_ref().map_or("", |_| ", each on processors of its own");
                format!("CPU, {path}, {replicas} replicas of {threads} threads{pinned}")
            }
            (cudas, _) => {
                let name = |cuda: &Cuda| {
                    let device = cuda.device();
                    format!("cuda:{}, {}", device.ordinal, device.name)
                };
                cudas.iter().map(name).collect::<Vec<_>>().join("; ")
            }
        };
        let mut checkpoint = match self.checkpoint {
            Some(checkpoint) => checkpoint,
            None => Checkpoint::load(&config.model)?,
        };
        if config.rope_frequency_dtype == RopeFrequencyDtype::Weights {
            checkpoint.round_rope_frequencies();
        }
        let weights = config.load_options(checkpoint.dtype())?;
        // Only text needs a tokenizer: a checkpoint without one still serves token ids.
        let tokenizer = checkpoint.tokenizer().map_err(|error| error.to_string());
        let chat_template = checkpoint.chat_template();
        // Every device holds a replica of its own; the plan is for the one with the least room.
        let free = cudas.iter().map(|cuda| cuda.device().free as u64).min();
        let memory = match free {
            Some(free) => {
                let all = free.saturating_mul(replicas as u64);
                PlannedMemory::on_device(&config, &checkpoint, all)?
            }
            None => PlannedMemory::new(&config, &checkpoint, threads)?,
        };
        // What keys and values depend on beside tokens and layout.
        let identity = format!(
            "{} {} {:?}",
            checkpoint.fingerprint(),
            config.weights.name(checkpoint.dtype()),
            config.rope_frequency_dtype
        );
        let loading = Loading {
            config: &config,
            checkpoint: &checkpoint,
            weights,
            plan: memory.plan,
            identity: &identity,
        };
        let attention = match (config.attention, self.selector) {
            (_, Some(selector)) => AttentionChoice::Custom(selector),
            (AttentionMode::Dense, None) => AttentionChoice::Dense,
            (_, None) => AttentionChoice::Policy(config.selection_policy()),
        };
        let adaptive = config.adaptive.then(|| Adaptive {
            target: config.target_latency().unwrap_or_default(),
            min_budget: config.adaptive_min_budget,
            max_budget: config.adaptive_max_budget,
            on_move: self.on_budget_move.unwrap_or_else(|| Arc::new(|_: &BudgetMove| {})),
        });
        let layers = checkpoint.config().layers;
        if config.adaptive && config.dense_layers >= layers {
            return Err(TinyServeError::Setting {
                field: "dense_layers",
                found: config.dense_layers.to_string(),
                expected: format!("fewer than the {layers} of the model with adaptive"),
            });
        }
        let plugins = self.plugins;
        config.register_plugins(&plugins)?;
        let scheduling = EngineConfig {
            plugins: plugins.clone(),
            max_sequence_length: memory.max_sequence_length,
            attention,
            adaptive,
            on_start: pinning.map_or_else(OnStart::default, |pinning| {
                OnStart::new(move |replica| pinning.pin(replica))
            }),
            eos: checkpoint.config().eos.clone(),
            tokenizer: tokenizer.as_ref().ok().cloned(),
            ..config.scheduling()
        };
        let (engine, weight_bytes, weights_cache) = if cudas.is_empty() {
            loading.start(backends, &scheduling, progress)?
        } else {
            let choose = |cuda| config.choose_fused(cuda, checkpoint.config(), checkpoint.dtype());
            let cudas = cudas.into_iter().map(choose).collect::<Result<Vec<_>, _>>()?;
            loading.start(cudas, &scheduling, progress)?
        };
        Ok(TinyServe {
            model: checkpoint.config().clone(),
            tokenizer,
            chat_template,
            memory,
            identity,
            weight_bytes,
            weights_cache,
            stored: checkpoint.dtype(),
            load: start.elapsed(),
            threads,
            backend_name,
            plugins,
            engine,
            config,
        })
    }
}

/// A backend whose threads run where those of `replica` shall.
fn pinned_cpu(
    options: CpuOptions,
    replica: usize,
    pinning: Option<&Pinning>,
) -> Result<Cpu, TinyServeError> {
    let Some(pinning) = pinning else { return Ok(Cpu::new(options)?) };
    // Threads inherit the processors of the one that starts them; the caller's stay as they are.
    let made = std::thread::scope(|scope| {
        let making = scope.spawn(|| {
            pinning.pin(replica);
            Cpu::new(options)
        });
        making.join()
    });
    Ok(made.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?)
}

/// What models are loaded from, whatever the device.
struct Loading<'a> {
    config: &'a TinyServeConfig,
    checkpoint: &'a Checkpoint,
    weights: LoadOptions,
    plan: MemoryPlan,
    identity: &'a str,
}

impl Loading<'_> {
    /// Loads the model onto each of `backends` and starts their engine; gives the bytes of all
    /// weights, and what became of their cache, too.
    fn start<B: Backend + 'static>(
        &self,
        backends: Vec<B>,
        scheduling: &EngineConfig,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<(Engine, usize, Option<CacheOutcome>), TinyServeError> {
        let Self { config, checkpoint, weights, plan, identity } = self;
        let MemoryPlan { layout, pages, .. } = *plan;
        let policy = config.eviction_policy.resolve(checkpoint);
        let prefixes = PrefixOptions { identity, layout, policy, max_pages: pages };
        let replicas = backends.len();
        let (mut weight_bytes, mut weights_cache) = (0, None);
        let mut runners = Vec::with_capacity(replicas);
        for (index, backend) in backends.into_iter().enumerate() {
            let model = Model::load_with(backend, checkpoint, weights, |done, total| {
                progress(index * total + done, replicas * total);
            })?;
            weight_bytes += model.weight_bytes();
            // The first one may have quantised and written what the others use.
            weights_cache = weights_cache.or_else(|| model.weights_cache().cloned());
            let mut cache = KvCache::new(model.backend(), layout, pages)?;
            if config.enable_prefix_caching {
                cache = cache.with_prefix_index(PrefixIndex::new(prefixes));
            }
            runners.push(ModelRunner::new(model, cache));
        }
        let engine = Engine::start_replicas("tinyserve-engine", runners, scheduling)?;
        Ok((engine, weight_bytes, weights_cache))
    }
}
