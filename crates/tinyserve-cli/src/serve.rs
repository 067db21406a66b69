//! `tinyserve serve`: answers requests over HTTP, as OpenAI's API does.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use tinyserve::{TinyServeConfig, Weights};
use tinyserve_server::{
    LogLevel, SchedulingPolicy, Server, ServerConfig, ServerError, load_config, with_bounded_queue,
};

use crate::args::{AdaptiveArgs, EngineArgs, PluginArgs, QueueArgs, ScheduleArgs, Sources};
use crate::exit::Usage;
use crate::values;

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    listen: ListenArgs,
    #[command(flatten)]
    sessions: SessionArgs,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    schedule: ScheduleArgs,
    #[command(flatten)]
    queue: QueueArgs,
    #[command(flatten)]
    wait: WaitArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// The same as --weights, by vLLM's name.
    #[arg(long, value_name = "DTYPE", help_heading = "Device", conflicts_with = "weights",
          value_parser = values::weights)]
    dtype: Option<Weights>,
    #[command(flatten)]
    adaptive: AdaptiveArgs,
    #[command(flatten)]
    plugins: PluginArgs,
}

/// Who is answered, and as whom.
#[derive(Debug, Args)]
#[command(next_help_heading = "Server")]
struct ListenArgs {
    /// Address to listen on [default: 127.0.0.1].
    #[arg(long, env = "TINYSERVE_HOST")]
    host: Option<String>,
    /// Port to listen on; 0 takes a free one [default: 8000].
    #[arg(long, env = "TINYSERVE_PORT")]
    port: Option<u16>,
    /// A Unix socket to listen on instead.
    #[arg(long, value_name = "PATH", env = "TINYSERVE_UDS")]
    uds: Option<PathBuf>,
    /// A key that requests must bring; may be given several times [default: none is asked for].
    #[arg(
        long,
        value_name = "KEY",
        env = "TINYSERVE_API_KEY",
        hide_env_values = true,
        value_delimiter = ','
    )]
    api_key: Vec<String>,
    /// What requests may call the model; may be given several times [default: its folder's name].
    #[arg(long, value_name = "NAME", env = "TINYSERVE_SERVED_MODEL_NAME", value_delimiter = ',')]
    served_model_name: Vec<String>,
    /// A file with a chat template that replaces the model's.
    #[arg(long, value_name = "FILE", env = "TINYSERVE_CHAT_TEMPLATE")]
    chat_template: Option<PathBuf>,
    /// An origin whose pages may ask from a browser, or *; may be given several times.
    #[arg(long, value_name = "ORIGIN", env = "TINYSERVE_ALLOWED_ORIGINS", value_delimiter = ',')]
    allowed_origins: Vec<String>,
    /// How much is written to stderr: off, info or debug (every request) [default: info].
    #[arg(long, value_name = "LEVEL", env = "TINYSERVE_LOG_LEVEL",
          value_parser = |text: &str| values::name::<LogLevel>(text, "off, info or debug"))]
    log_level: Option<LogLevel>,
    /// Writes prompts to stderr, too.
    #[arg(long, env = "TINYSERVE_LOG_PROMPTS", value_parser = clap::builder::BoolishValueParser::new())]
    log_prompts: bool,
}

/// How long sessions live, and where they are saved.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sessions")]
struct SessionArgs {
    /// Seconds without a request after which a session is deleted; its file stays [default: 300].
    #[arg(long, value_name = "SECONDS", env = "TINYSERVE_SESSION_TIMEOUT")]
    session_timeout: Option<f64>,
    /// Folder that requests may save sessions in and restore them from [default: they may not].
    #[arg(long, value_name = "DIR", env = "TINYSERVE_SESSION_FOLDER")]
    session_folder: Option<PathBuf>,
    /// Restores all saved sessions at the start; a damaged one is told and left out.
    #[arg(long, env = "TINYSERVE_RESTORE_SESSIONS",
          value_parser = clap::builder::BoolishValueParser::new())]
    restore_sessions: bool,
    /// Sessions that are saved at once [default: 1000].
    #[arg(long, value_name = "N", env = "TINYSERVE_MAX_SAVED_SESSIONS", value_parser = values::size)]
    max_saved_sessions: Option<usize>,
}

/// What a client may ask for, and how long it may take.
#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
struct LimitArgs {
    /// Bytes of a request's body [default: 32M].
    #[arg(long, value_name = "BYTES", env = "TINYSERVE_MAX_REQUEST_BYTES", value_parser = values::size)]
    max_request_bytes: Option<usize>,
    /// Prompts of one request [default: 1024].
    #[arg(long, value_name = "N", env = "TINYSERVE_MAX_PROMPTS_PER_REQUEST", value_parser = values::size)]
    max_prompts_per_request: Option<usize>,
    /// Answers to one prompt [default: 64].
    #[arg(long, value_name = "N", env = "TINYSERVE_MAX_N", value_parser = values::size)]
    max_n: Option<usize>,
    /// Alternatives whose probabilities are told [default: 20].
    #[arg(long, value_name = "N", env = "TINYSERVE_MAX_LOGPROBS", value_parser = values::size)]
    max_logprobs: Option<usize>,
    /// Stop strings of one request [default: 4].
    #[arg(long, value_name = "N", env = "TINYSERVE_MAX_STOP_STRINGS", value_parser = values::size)]
    max_stop_strings: Option<usize>,
    /// Connections that are open at once; more wait [default: 4096].
    #[arg(long, value_name = "N", env = "TINYSERVE_MAX_CONNECTIONS", value_parser = values::size)]
    max_connections: Option<usize>,
    /// Seconds for sending the head of a request [default: 10].
    #[arg(long, value_name = "SECONDS", env = "TINYSERVE_HEADER_TIMEOUT")]
    header_timeout: Option<f64>,
    /// Seconds for sending the body of a request [default: 30].
    #[arg(long, value_name = "SECONDS", env = "TINYSERVE_BODY_TIMEOUT")]
    body_timeout: Option<f64>,
    /// Seconds that a client may leave what was sent to it unread [default: 30].
    #[arg(long, value_name = "SECONDS", env = "TINYSERVE_WRITE_TIMEOUT")]
    write_timeout: Option<f64>,
    /// Seconds without an event after which a stream gets a comment [default: 15].
    #[arg(long, value_name = "SECONDS", env = "TINYSERVE_KEEP_ALIVE_INTERVAL")]
    keep_alive_interval: Option<f64>,
    /// Seconds that running requests have when the server is asked to stop [default: 30].
    #[arg(long, value_name = "SECONDS", env = "TINYSERVE_DRAIN_TIMEOUT")]
    drain_timeout: Option<f64>,
}

/// Who runs first, and with which seed.
#[derive(Debug, Args)]
#[command(next_help_heading = "Scheduling")]
struct WaitArgs {
    /// Seconds of waiting that count as much as one step of priority [default: 10].
    #[arg(long, value_name = "SECONDS", env = "TINYSERVE_PRIORITY_AGEING")]
    priority_ageing: Option<f64>,
    /// Which waiting request runs first: priority (the lower), or fcfs, which refuses priorities
    /// [default: priority].
    #[arg(long, value_name = "NAME", env = "TINYSERVE_SCHEDULING_POLICY",
          value_parser = |text: &str| values::name::<SchedulingPolicy>(text, "priority or fcfs"))]
    scheduling_policy: Option<SchedulingPolicy>,
    /// Seed of requests that bring none: the same requests in the same order get the same answers
    /// [default: another at each start].
    #[arg(long, value_name = "N", env = "TINYSERVE_SEED")]
    seed: Option<u64>,
}

impl WaitArgs {
    fn apply(&self, config: &mut TinyServeConfig) {
        set(&mut config.priority_ageing, self.priority_ageing);
    }
}

impl ServeArgs {
    fn apply(&self, config: &mut ServerConfig) {
        let Self { listen, limits, sessions, wait, .. } = self;
        set(&mut config.host, listen.host.clone());
        set(&mut config.port, listen.port);
        set_some(&mut config.uds, listen.uds.clone());
        set_list(&mut config.api_key, &listen.api_key);
        set_list(&mut config.served_model_name, &listen.served_model_name);
        set_some(&mut config.chat_template, listen.chat_template.clone());
        set_list(&mut config.allowed_origins, &listen.allowed_origins);
        set(&mut config.log_level, listen.log_level);
        config.log_prompts |= listen.log_prompts;
        set(&mut config.max_request_bytes, limits.max_request_bytes);
        set(&mut config.max_prompts_per_request, limits.max_prompts_per_request);
        set(&mut config.max_n, limits.max_n);
        set(&mut config.max_logprobs, limits.max_logprobs);
        set(&mut config.max_stop_strings, limits.max_stop_strings);
        set(&mut config.max_connections, limits.max_connections);
        set(&mut config.header_timeout, limits.header_timeout);
        set(&mut config.body_timeout, limits.body_timeout);
        set(&mut config.write_timeout, limits.write_timeout);
        set(&mut config.keep_alive_interval, limits.keep_alive_interval);
        set(&mut config.drain_timeout, limits.drain_timeout);
        set_some(&mut config.session_folder, sessions.session_folder.clone());
        config.restore_sessions |= sessions.restore_sessions;
        set(&mut config.max_saved_sessions, sessions.max_saved_sessions);
        set(&mut config.scheduling_policy, wait.scheduling_policy);
        set_some(&mut config.seed, wait.seed);
    }
}

/// Serves until a signal ends it.
pub(crate) fn serve(args: &ServeArgs, sources: Sources) -> Result<()> {
    let (engine, mut server) = match args.engine.forward.model.file() {
        Some(file) => load_config(file)?,
        None => Default::default(),
    };
    args.apply(&mut server);
    server.check().map_err(by_flag)?;
    let mut engine = engine;
    args.schedule.apply(&mut engine);
    args.queue.apply(&mut engine);
    args.wait.apply(&mut engine);
    args.adaptive.apply(&mut engine)?;
    set(&mut engine.weights, args.dtype);
    args.plugins.offer(&mut engine);
    set(&mut engine.session_timeout, args.sessions.session_timeout);
    let engine = args.engine.config_from(engine, sources)?;
    let engine = with_bounded_queue(engine);
    let tells_moves = server.log_level >= LogLevel::Info;
    let bound = Server::bind(server).map_err(by_flag)?;
    let device = args.engine.forward.device.clone();
    let model = engine.model.clone();
    bound.run(&model, move || device.prepare(engine, tells_moves)).map_err(by_flag)
}

/// A setting of the server's, called by its flag.
fn by_flag(error: ServerError) -> anyhow::Error {
    match error {
        ServerError::Setting { field, found, expected } => {
            let flag = field.replace('_', "-");
            Usage(format!("--{flag} is {found}, expected {expected}")).into()
        }
        // The engine's own error, so that its settings are called by their flags, too.
        ServerError::Engine(error) => error.into(),
        error => error.into(),
    }
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

fn set_some<T>(field: &mut Option<T>, value: Option<T>) {
    if value.is_some() {
        *field = value;
    }
}

fn set_list(field: &mut Vec<String>, values: &[String]) {
    if !values.is_empty() {
        *field = values.to_vec();
    }
}
