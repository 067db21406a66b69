//! Order, switches, isolation and statistics of plugins.

use std::sync::{Arc, Mutex};

use tinyserve_plugins::{
    Action, EntropyExit, Finish, FinishContext, HookError, HookResult, Needs, Plugin, PluginError,
    PluginManager, PrefillContext, Prefilled, Pruned, RequestContext, RequestInfo, RequestPlugins,
    Step, StepContext, Verdict,
};

fn request(id: &str) -> RequestInfo {
    RequestInfo { id: id.to_owned(), prompt: vec![1, 2, 3], max_tokens: 8, page_size: 4 }
}

fn begin(manager: &PluginManager) -> RequestPlugins {
    manager.begin(request("a"), []).unwrap()
}

/// A step over these logits that tells nothing else.
fn step<'a>(generated: &'a [u32], logits: &'a mut [f32]) -> Step<'a> {
    Step { generated, cached_tokens: 10, logits, attention_entropy: None, mass: None }
}

fn run(plugins: &mut RequestPlugins) -> Verdict {
    plugins.on_step(step(&[], &mut [0.0; 4])).unwrap()
}

/// Notes its calls in a log that all of them share.
struct Noted {
    name: &'static str,
    log: Arc<Mutex<Vec<String>>>,
}

impl Noted {
    fn note(&self, hook: &str) {
        self.log.lock().unwrap().push(format!("{} {hook}", self.name));
    }
}

impl Plugin for Noted {
    fn on_request(&self, context: &mut RequestContext<'_>) -> HookResult {
        self.note(&format!("request {} of {}", context.request_id(), context.prompt().len()));
        Ok(Action::Continue)
    }
    fn on_prefill(&self, context: &mut PrefillContext<'_>) -> HookResult {
        self.note(&format!("prefill {:?} {}", context.computed(), context.is_last()));
        Ok(Action::Continue)
    }
    fn on_step(&self, context: &mut StepContext<'_>) -> HookResult {
        let steps: &mut usize = context.state();
        *steps += 1;
        let steps = *steps;
        self.note(&format!("step {steps} at {}", context.position()));
        Ok(Action::Continue)
    }
    fn on_finish(&self, context: &mut FinishContext<'_>) -> Result<(), HookError> {
        self.note(&format!("finish {} {}", context.reason(), context.generated().len()));
        Ok(())
    }
}

#[test]
fn hooks_run_by_priority_then_in_the_order_of_registration() {
    let (manager, log) = (PluginManager::new(), Arc::new(Mutex::new(Vec::new())));
    for (priority, name) in [(0, "b"), (5, "d"), (-1, "a"), (0, "c")] {
        manager.register_at(priority, name, Noted { name, log: log.clone() }).unwrap();
    }
    let mut plugins = begin(&manager);
    plugins.on_request().unwrap();
    let computed = 0..3;
    let prefilled = Prefilled { computed, first: true, last: true, cached_tokens: 3, mass: None };
    plugins.on_prefill(&prefilled).unwrap();
    run(&mut plugins);
    plugins.on_step(step(&[7], &mut [0.0; 4])).unwrap();
    plugins.on_finish(Finish { generated: &[7, 8], reason: "length" });
    let hooks =
        ["request a of 3", "prefill 0..3 true", "step 1 at 3", "step 2 at 4", "finish length 2"];
    let expected: Vec<String> = hooks
        .iter()
        .flat_map(|hook| ["a", "b", "c", "d"].map(|name| format!("{name} {hook}")))
        .collect();
    assert_eq!(*log.lock().unwrap(), expected);
    let stats = manager.stats();
    let names: Vec<&str> = stats.iter().map(|stats| stats.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c", "d"]);
    for stats in stats {
        assert_eq!((stats.calls, stats.successes, stats.errors), (5, 5, 0));
        assert!(stats.enabled && stats.early_exit_count + stats.pruning_count == 0);
    }
}

#[test]
fn what_one_request_remembers_is_not_another_requests() {
    let (manager, log) = (PluginManager::new(), Arc::new(Mutex::new(Vec::new())));
    manager.register("n", Noted { name: "n", log: log.clone() }).unwrap();
    let (mut a, mut b) = (begin(&manager), begin(&manager));
    run(&mut a);
    run(&mut a);
    run(&mut b);
    assert_eq!(*log.lock().unwrap(), ["n step 1 at 3", "n step 2 at 3", "n step 1 at 3"]);
}

#[test]
fn plugins_are_switched_for_the_engine_and_for_a_request() {
    let manager = PluginManager::new();
    manager.register_fn("stop", |_| Action::stop("asked to")).unwrap();
    let stops = |plugins: &mut RequestPlugins| run(plugins).stop.is_some();
    let (mut follows, mut never) =
        (begin(&manager), manager.begin(request("b"), [("stop", false)]).unwrap());
    assert!(stops(&mut follows) && !stops(&mut never) && never.is_idle());
    manager.disable("stop").unwrap();
    let mut always = manager.begin(request("c"), [("stop", true)]).unwrap();
    assert!(!stops(&mut follows) && follows.is_idle(), "it follows the engine at once");
    assert!(stops(&mut always) && !stops(&mut begin(&manager)));
    assert!(!manager.stats()[0].enabled);
    // Another handle is the same manager.
    manager.clone().enable("stop").unwrap();
    assert!(stops(&mut follows) && !stops(&mut never));
    never.choose("stop", true).unwrap();
    assert!(stops(&mut never));
    let stats = &manager.stats()[0];
    assert_eq!((stats.calls, stats.early_exit_count), (4, 4), "switched off, it is not called");
}

#[test]
fn a_step_has_the_plugins_that_were_on_when_it_was_planned() {
    let manager = PluginManager::new();
    manager.register("watch", EntropyExit::default()).unwrap();
    manager.disable("watch").unwrap();
    let mut plugins = begin(&manager);
    plugins.plan();
    manager.enable("watch").unwrap();
    assert!(plugins.is_idle() && !plugins.needs().attention_entropy);
    run(&mut plugins);
    assert_eq!(manager.stats()[0].calls, 0);
    plugins.plan();
    manager.disable("watch").unwrap();
    assert!(!plugins.is_idle() && plugins.needs().attention_entropy);
    plugins.plan();
    assert!(plugins.is_idle());
}

#[test]
fn names_are_checked() {
    let manager = PluginManager::new();
    let unknown = manager.enable("x").unwrap_err().to_string();
    assert_eq!(unknown, "no plugin is called \"x\", expected none: no plugin is registered");
    manager.register_fn("a", |_| ()).unwrap();
    manager.register_fn("b", |_| ()).unwrap();
    assert_eq!(manager.register_fn("a", |_| ()), Err(PluginError::Taken("a".to_owned())));
    assert!(manager.register_fn("", |_| ()).unwrap_err().to_string().contains("empty"));
    let message = "no plugin is called \"c\", expected a, b";
    assert_eq!(manager.disable("c").unwrap_err().to_string(), message);
    let begun = manager.begin(request("a"), [("a", true), ("c", true)]);
    assert_eq!(begun.unwrap_err().to_string(), message);
}

#[test]
fn a_failing_plugin_is_named_and_counted_and_ends_nothing_else() {
    let manager = PluginManager::new();
    manager
        .register_fn("panics", |ctx| {
            assert!(ctx.request_id() != "a", "not {}", ctx.request_id());
        })
        .unwrap();
    manager
        .register_fn("fails", |ctx| (ctx.request_id() != "b").then_some(()).ok_or("no b"))
        .unwrap();
    let [mut a, mut b, mut c] = ["a", "b", "c"].map(|id| manager.begin(request(id), []).unwrap());
    let fail = |plugins: &mut RequestPlugins| {
        plugins.on_step(step(&[], &mut [0.0; 4])).unwrap_err().to_string()
    };
    assert_eq!(fail(&mut a), "plugin \"panics\" failed in on_step: panicked: not a");
    assert_eq!(fail(&mut b), "plugin \"fails\" failed in on_step: no b");
    assert_eq!(run(&mut c), Verdict::default());
    let stats = manager.stats();
    let counts: Vec<_> = stats.iter().map(|it| (it.calls, it.successes, it.errors)).collect();
    assert_eq!(counts, [(3, 2, 1), (2, 1, 1)]);
}

#[test]
fn impossible_answers_are_failures() {
    fn answer(action: Action) -> String {
        let manager = PluginManager::new();
        manager.register_fn("p", move |_| action.clone()).unwrap();
        let mut plugins = begin(&manager);
        plugins.on_step(step(&[], &mut [f32::INFINITY, 0.0, 0.0, 0.0])).unwrap_err().to_string()
    }
    let cases = [
        (Action::Bias(vec![(1, 1.0), (4, 1.0)]), "on_step: it biases token 4 of 4"),
        (Action::Bias(vec![(0, f32::NEG_INFINITY)]), "on_step: it biases token 0 by -inf"),
        (Action::Prune(vec![3, 10]), "on_step: it prunes place 10 of 10"),
        (Action::Prune((0..10).rev().collect()), "pruning: it leaves none of the 10 tokens"),
    ];
    for (action, expected) in cases {
        let message = answer(action);
        assert!(message.contains("plugin \"p\"") && message.contains(expected), "{message}");
    }
    let manager = PluginManager::new();
    manager.register_fn("p", |ctx| ctx.logits_mut()[2] = f32::NAN).unwrap();
    let failure = begin(&manager).on_step(step(&[], &mut [0.0; 4])).unwrap_err();
    assert!(failure.message.contains("not a number"), "{failure}");

    struct Early(Action);
    impl Plugin for Early {
        fn on_request(&self, _: &mut RequestContext<'_>) -> HookResult {
            Ok(self.0.clone())
        }
    }
    for action in [Action::Bias(Vec::new()), Action::Prune(Vec::new())] {
        let manager = PluginManager::new();
        manager.register("early", Early(action)).unwrap();
        let failure = begin(&manager).on_request().unwrap_err();
        assert!(failure.message.ends_with("yet"), "{failure}");
    }
    let manager = PluginManager::new();
    manager.register("early", Early(Action::stop("not today"))).unwrap();
    assert_eq!(begin(&manager).on_request().unwrap().stop.unwrap().reason, "not today");
}

#[test]
fn logits_are_edited_in_order() {
    let manager = PluginManager::new();
    manager
        .register_fn("double", |ctx| ctx.logits_mut().iter_mut().for_each(|x| *x *= 2.0))
        .unwrap();
    manager.register_fn("add", |_| Action::Bias(vec![(1, 0.5), (1, 0.5), (3, -1.0)])).unwrap();
    manager
        .register_fn("look", |ctx| {
            assert_eq!(ctx.logits(), [2.0, 5.0, 6.0, 7.0]);
        })
        .unwrap();
    let mut logits = [1.0, 2.0, 3.0, 4.0];
    begin(&manager).on_step(step(&[], &mut logits)).unwrap();
    assert_eq!(logits, [2.0, 5.0, 6.0, 7.0]);
}

#[test]
fn who_stops_first_ends_the_step() {
    let manager = PluginManager::new();
    manager.register_fn("prune", |_| Action::Prune(vec![4])).unwrap();
    manager.register_fn("first", |_| Action::stop("one")).unwrap();
    manager.register_fn("second", |_| Action::stop("two")).unwrap();
    let verdict = run(&mut begin(&manager));
    let stop = verdict.stop.unwrap();
    assert_eq!((stop.plugin.as_str(), stop.reason.as_str()), ("first", "one"));
    assert!(verdict.prune.is_empty(), "there is no cache left to prune");
    let stats = manager.stats();
    assert_eq!((stats[1].early_exit_count, stats[2].calls), (1, 0));
    assert_eq!(stats[0].pruning_count, 0);
}

/// Prunes what it is told to, and keeps the mass that it saw.
struct Pruner {
    places: Vec<u32>,
    seen: Arc<Mutex<Vec<Vec<f32>>>>,
}

impl Plugin for Pruner {
    fn needs(&self) -> Needs {
        Needs { attention_mass: true, ..Needs::default() }
    }
    fn on_step(&self, context: &mut StepContext<'_>) -> HookResult {
        let mass = context.attention_mass().ok_or("no mass")?.to_vec();
        self.seen.lock().unwrap().push(mass);
        let places = if context.generated().is_empty() { self.places.clone() } else { Vec::new() };
        Ok(Action::Prune(places))
    }
}

#[test]
fn mass_adds_up_and_follows_what_is_pruned() {
    let (manager, seen) = (PluginManager::new(), Arc::new(Mutex::new(Vec::new())));
    for (name, places) in [("x", vec![4, 1, 1]), ("y", vec![2, 1])] {
        manager.register(name, Pruner { places, seen: seen.clone() }).unwrap();
    }
    manager.register_fn("blind", |ctx| assert_eq!(ctx.attention_mass(), None)).unwrap();
    let mut plugins = begin(&manager);
    assert!(plugins.needs().attention_mass && !plugins.needs().attention_entropy);
    let parts = [(0..2, &[1.0, 0.5][..]), (2..5, &[0.5, 0.5, 0.5, 1.0, 2.0])];
    for (computed, mass) in parts {
        let (first, last) = (computed.start == 0, computed.end == 5);
        let cached_tokens = computed.end;
        let mass = Some(mass);
        plugins.on_prefill(&Prefilled { computed, first, last, cached_tokens, mass }).unwrap();
    }
    let (mut logits, generated) = ([0.0; 4], [9]);
    fn after<'a>(
        mass: Option<&'a [f32]>,
        cached_tokens: usize,
        generated: &'a [u32],
        logits: &'a mut [f32],
    ) -> Step<'a> {
        Step { generated, cached_tokens, logits, attention_entropy: None, mass }
    }
    let verdict = plugins.on_step(after(None, 5, &[], &mut logits)).unwrap();
    assert_eq!(verdict.prune, [1, 2, 4], "both get what they want, once");
    plugins.pruned(&verdict, Pruned { bytes_before: 200, bytes_after: 100 });
    // Tokens 0 and 3 are left, and the next one has come.
    let mass = [0.25, 0.25, 0.5];
    let verdict = plugins.on_step(after(Some(&mass), 3, &generated, &mut logits)).unwrap();
    assert!(verdict.prune.is_empty());
    let seen = seen.lock().unwrap();
    assert_eq!(seen[0], [1.5, 1.0, 0.5, 1.0, 2.0]);
    assert_eq!((seen.len(), seen[3].as_slice()), (4, &[1.75, 1.25, 0.5][..]));
    let stats = manager.stats();
    for (stats, tokens) in stats.iter().zip([2, 2, 0]) {
        let times = u64::from(tokens > 0);
        assert_eq!((stats.pruning_count, stats.pruned_tokens), (times, tokens));
        let bytes = (stats.bytes_before_pruning, stats.bytes_after_pruning);
        assert_eq!(bytes, (200 * times, 100 * times));
    }
}

#[test]
fn after_a_preemption_mass_begins_again() {
    let (manager, seen) = (PluginManager::new(), Arc::new(Mutex::new(Vec::new())));
    manager.register("x", Pruner { places: Vec::new(), seen: seen.clone() }).unwrap();
    let mut plugins = begin(&manager);
    for mass in [[1.0, 2.0, 3.0], [0.5, 0.5, 0.5]] {
        let mass = Some(&mass[..]);
        let computed = 0..3;
        let prefilled = Prefilled { computed, first: true, last: true, cached_tokens: 3, mass };
        plugins.on_prefill(&prefilled).unwrap();
        let (generated, cached_tokens, logits) = (&[][..], 3, &mut [0.0; 4][..]);
        let step = Step { generated, cached_tokens, logits, attention_entropy: None, mass: None };
        plugins.on_step(step).unwrap();
    }
    assert_eq!(*seen.lock().unwrap(), [[1.0, 2.0, 3.0], [0.5, 0.5, 0.5]]);
}

#[test]
fn one_manager_serves_several_engines() {
    let manager = PluginManager::new();
    manager.register("exit", EntropyExit::default()).unwrap();
    let mut count = 0u64;
    manager
        .register_fn("count", move |_| {
            count += 1;
            if count == 400 { Action::stop("enough") } else { Action::Continue }
        })
        .unwrap();
    let stops: usize = std::thread::scope(|scope| {
        let engines: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut plugins = manager.begin(request("a"), [("exit", false)]).unwrap();
                    (0..100).filter(|_| run(&mut plugins).stop.is_some()).count()
                })
            })
            .collect();
        engines.into_iter().map(|engine| engine.join().unwrap()).sum()
    });
    assert_eq!(stops, 1);
    assert_eq!((manager.stats()[0].calls, manager.stats()[1].calls), (0, 400));
}
