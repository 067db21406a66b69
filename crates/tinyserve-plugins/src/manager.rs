//! Which plugins there are, in which order they run, and which are enabled.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::stats::Counters;
use crate::{
    HookResult, IntoAction, Plugin, PluginError, PluginStats, RequestInfo, RequestPlugins,
    StepContext,
};

/// A registered plugin.
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) priority: i32,
    pub(crate) plugin: Box<dyn Plugin>,
    pub(crate) enabled: AtomicBool,
    pub(crate) counters: Counters,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The plugins of an engine.
///
/// A clone is another handle of the same plugins: an engine holds one, and whoever enables,
/// disables or looks at the statistics meanwhile another. Requests take the plugins that there are
/// when they begin; switching a plugin on or off reaches running requests with their next step.
#[derive(Debug, Clone, Default)]
pub struct PluginManager {
    entries: Arc<RwLock<Vec<Arc<Entry>>>>,
}

impl PluginManager {
    /// A manager without plugins.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Registers a plugin, enabled, with priority 0.
    ///
    /// # Errors
    /// [`PluginError::Taken`] when there is one of this name, [`PluginError::Invalid`] when the
    /// name is empty.
    pub fn register(
        &self,
        name: impl Into<String>,
        plugin: impl Plugin + 'static,
    ) -> Result<(), PluginError> {
        self.register_at(0, name, plugin)
    }

    /// Registers a plugin, enabled; those with a lower priority value run first, and those with
    /// the same one in the order in which they were registered.
    ///
    /// # Errors
    /// As [`Self::register`].
    pub fn register_at(
        &self,
        priority: i32,
        name: impl Into<String>,
        plugin: impl Plugin + 'static,
    ) -> Result<(), PluginError> {
        let name = name.into();
        if name.is_empty() {
            return Err(PluginError::invalid("a plugin's name", "empty", "a word"));
        }
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        if entries.iter().any(|entry| entry.name == name) {
            return Err(PluginError::Taken(name));
        }
        let place = entries.partition_point(|entry| entry.priority <= priority);
        let entry = Entry {
            name,
            priority,
            plugin: Box::new(plugin),
            enabled: AtomicBool::new(true),
            counters: Counters::default(),
        };
        entries.insert(place, Arc::new(entry));
        Ok(())
    }

    /// Registers a closure that runs in every step, before a token is drawn.
    ///
    /// It returns an [`crate::Action`], nothing, or a result of either. Requests on several engines
    /// take turns in it.
    ///
    /// ```
    /// use tinyserve_plugins::{Action, PluginManager};
    ///
    /// let manager = PluginManager::new();
    /// manager.register_fn("ten_tokens", |ctx| {
    ///     if ctx.generated().len() < 10 { Action::Continue } else { Action::stop("ten_tokens") }
    /// })?;
    /// # Ok::<(), tinyserve_plugins::PluginError>(())
    /// ```
    ///
    /// # Errors
    /// As [`Self::register`].
    pub fn register_fn<F, A>(&self, name: impl Into<String>, f: F) -> Result<(), PluginError>
    where
        F: FnMut(&mut StepContext<'_>) -> A + Send + 'static,
        A: IntoAction,
    {
        self.register(name, Closure(Mutex::new(f)))
    }

    /// Lets requests use a plugin from their next step on, unless they choose otherwise.
    ///
    /// # Errors
    /// [`PluginError::Unknown`] when there is none of this name.
    pub fn enable(&self, name: &str) -> Result<(), PluginError> {
        self.switch(name, true)
    }

    /// Keeps requests from using a plugin from their next step on, unless they choose otherwise.
    ///
    /// # Errors
    /// [`PluginError::Unknown`] when there is none of this name.
    pub fn disable(&self, name: &str) -> Result<(), PluginError> {
        self.switch(name, false)
    }

    fn switch(&self, name: &str, enabled: bool) -> Result<(), PluginError> {
        let entries = self.entries();
        let entry = entries.iter().find(|entry| entry.name == name);
        entry.ok_or_else(|| unknown(name, &entries))?.enabled.store(enabled, Relaxed);
        Ok(())
    }

    /// What each plugin did, in the order in which they run.
    #[must_use]
    pub fn stats(&self) -> Vec<PluginStats> {
        let stats = |entry: &Arc<Entry>| {
            entry.counters.stats(&entry.name, entry.priority, entry.enabled.load(Relaxed))
        };
        self.entries().iter().map(stats).collect()
    }

    /// What a request needs of the plugins: call its hooks as the request goes on.
    ///
    /// # Errors
    /// [`PluginError::Unknown`] when it chooses a plugin that there is not.
    pub fn begin<'n>(
        &self,
        request: RequestInfo,
        choices: impl IntoIterator<Item = (&'n str, bool)>,
    ) -> Result<RequestPlugins, PluginError> {
        let entries = self.entries();
        let mut plugins = RequestPlugins::new(request, entries.clone());
        for (name, enabled) in choices {
            plugins.choose(name, enabled).ok_or_else(|| unknown(name, &entries))?;
        }
        Ok(plugins)
    }

    fn entries(&self) -> Vec<Arc<Entry>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn unknown(name: &str, entries: &[Arc<Entry>]) -> PluginError {
    let names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    let expected = match names.as_slice() {
        [] => "none: no plugin is registered".to_owned(),
        names => names.join(", "),
    };
    PluginError::Unknown { name: name.to_owned(), expected }
}

/// A closure as a plugin.
struct Closure<F>(Mutex<F>);

impl<F, A> Plugin for Closure<F>
where
    F: FnMut(&mut StepContext<'_>) -> A + Send,
    A: IntoAction,
{
    fn on_step(&self, context: &mut StepContext<'_>) -> HookResult {
        // A panic ended another request, and what the closure holds is its own business.
        let mut f = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        f(context).into_action()
    }
}
