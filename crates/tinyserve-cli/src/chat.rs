//! `tinyserve chat`: a conversation in the terminal, in one session whose keys and values stay.

mod lines;
mod saved;

use std::ops::ControlFlow;

use anyhow::{Result, anyhow};
use clap::Args;
use tinyserve::model::{ChatInput, ChatMessage, ChatTemplate, SamplingParams};
use tinyserve::{
    FinishReason, Prompt, StreamEvent, TinyServe, TinyServeError, TinyServeRequest,
    TinyServeResponse,
};

use crate::args::{AdaptiveArgs, EngineArgs, PluginArgs, Sources};
use crate::exit::{Quiet, out_of_range};
use crate::interrupt::{Conversation, Interrupt};
use crate::run::SamplingArgs;
use crate::units::{bytes, count, milliseconds, percent};
use crate::{output, values};
use lines::{Line, Lines};

const HELP: &str = "\
/reset       forget the conversation
/save NAME   write the conversation to NAME.json, its keys and values to NAME.session
/load NAME   go on with a conversation that was saved
/stats       what the last answer cost, and what the conversation holds
/help        these lines
/exit        leave (as Ctrl-D does)
Ctrl-C stops an answer; the arrow keys edit a line and bring back earlier ones.
";
const LEAVE: &str = "(/exit or Ctrl-D leaves, and so does Ctrl-C once more)\n";

/// The conversation's session.
const SESSION: &str = "chat";

#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    /// What the model is told before the conversation.
    #[arg(long, value_name = "TEXT", env = "TINYSERVE_SYSTEM")]
    system: Option<String>,
    /// Most tokens of an answer.
    #[arg(short = 'n', long, value_name = "N", default_value = "512", env = "TINYSERVE_MAX_TOKENS",
          value_parser = values::size)]
    max_tokens: usize,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    adaptive: AdaptiveArgs,
    #[command(flatten)]
    plugins: PluginArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Talks until the input ends.
pub(crate) fn chat(args: &ChatArgs, sources: Sources) -> Result<()> {
    let mut config = args.engine.config(sources)?;
    // One request at a time: memory for others would only make the plan larger.
    config.max_num_seqs = 1;
    // However long the user thinks, the conversation stays.
    config.session_timeout = 1e9;
    args.plugins.apply(&mut config)?;
    args.adaptive.apply(&mut config)?;
    config.check()?;
    if args.max_tokens == 0 {
        return Err(out_of_range("--max-tokens (-n)", 0, "at least 1"));
    }
    let sampling = args.sampling.params()?;
    let engine = args.engine.forward.device.load(config)?;
    let template = engine.chat_template()?.ok_or_else(|| {
        anyhow!(
            "{} has no chat template, expected chat_template.jinja or the field chat_template in \
             tokenizer_config.json: `tinyserve run` continues a text without one",
            engine.config().model
        )
    })?;
    let conversation = Interrupt::converse(LEAVE)?;
    let mut chat =
        Chat { engine: &engine, template, args, sampling, messages: Vec::new(), last: None };
    chat.reset()?;
    let mut lines = Lines::open()?;
    if lines.is_terminal() {
        eprintln!("{}; /help says what there is besides talking.", engine.config().model);
    }
    let mut interrupted = false;
    loop {
        conversation.answers(false);
        let line = match lines.next()? {
            Line::Said(line) => line,
            Line::End => return Ok(()),
            Line::Interrupted if interrupted => return Err(Quiet::Interrupted.into()),
            Line::Interrupted => {
                interrupted = true;
                eprint!("{LEAVE}");
                continue;
            }
        };
        interrupted = false;
        let (command, name) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
        match line.trim() {
            "" => {}
            _ if command == "/save" => told(chat.save(name.trim())),
            _ if command == "/load" => told(chat.load(name.trim())),
            "/exit" | "/quit" | "/bye" => return Ok(()),
            "/help" => eprint!("{HELP}"),
            "/reset" => chat.reset()?,
            "/stats" => eprint!("{}", chat.stats()?),
            unknown if unknown.starts_with('/') => {
                eprintln!("{unknown} is no command:\n{}", HELP.trim_end());
            }
            said => {
                conversation.answers(true);
                chat.say(said, &conversation)?;
            }
        }
    }
}

/// Tells what a command did, or why it did not; the conversation goes on.
fn told(done: Result<String>) {
    match done {
        Ok(lines) => eprint!("{lines}"),
        Err(error) => eprintln!("error: {error:#}"),
    }
}

struct Chat<'a> {
    engine: &'a TinyServe,
    template: &'a ChatTemplate,
    args: &'a ChatArgs,
    sampling: SamplingParams,
    messages: Vec<ChatMessage>,
    last: Option<TinyServeResponse>,
}

impl Chat<'_> {
    /// Forgets what was said.
    fn reset(&mut self) -> Result<()> {
        self.engine.delete_session(SESSION)?;
        self.last = None;
        self.messages.clear();
        let system = self.args.system.iter().map(|text| ChatMessage::new("system", text));
        self.messages.extend(system);
        Ok(())
    }

    /// Answers, and remembers both. What cannot be answered is forgotten again.
    fn say(&mut self, said: &str, conversation: &Conversation) -> Result<()> {
        self.messages.push(ChatMessage::new("user", said));
        match self.answer(conversation) {
            Ok(response) => {
                let text = response.generated_text.trim_end();
                self.messages.push(ChatMessage::new("assistant", text));
                if response.finish_reason == FinishReason::Cancelled {
                    eprintln!("(stopped)");
                }
                self.last = Some(response);
                Ok(())
            }
            // Nobody reads the answers any more.
            Err(error) if error.is::<Quiet>() => Err(error),
            Err(error) => {
                self.messages.pop();
                eprintln!("error: {error}");
                Ok(())
            }
        }
    }

    fn answer(&self, conversation: &Conversation) -> Result<TinyServeResponse> {
        let prompt = self.template.render(ChatInput {
            messages: &self.messages,
            tools: None,
            add_generation_prompt: true,
            continue_final_message: false,
            arguments: None,
        });
        let prompt = prompt.map_err(TinyServeError::from)?;
        // The template writes the special tokens itself.
        let prompt =
            self.engine.tokenizer()?.encode(&prompt, false).map_err(TinyServeError::from)?;
        let (tokens, limit) = (prompt.len(), self.engine.max_sequence_length());
        if tokens > limit {
            return Err(anyhow!(
                "the conversation has {tokens} tokens with this, expected at most {limit}, the \
                 context length: say less, or /reset to begin a new one"
            ));
        }
        let mut request = TinyServeRequest::new(Prompt::Tokens(prompt)).session(SESSION);
        request.max_tokens = self.args.max_tokens;
        request.sampling = self.sampling;
        let mut written = Ok(());
        let response = self.engine.serve_stream(request, |event| {
            if let StreamEvent::Token { text, .. } | StreamEvent::Rest { text } = event
                && !text.is_empty()
                && written.is_ok()
            {
                written = output::text(&text);
            }
            if written.is_err() || conversation.pressed() {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        });
        written?;
        let response = response?;
        output::text("\n")?;
        Ok(response)
    }

    /// What the conversation holds and what the last answer cost, in lines.
    fn stats(&self) -> Result<String> {
        let Some(last) = &self.last else { return Ok("nothing was said yet\n".to_owned()) };
        let (timings, kv) = (&last.timings, &last.kv);
        let mut lines = format!(
            "prompt    {} tokens, {} of them kept from before; first token after {}\n",
            count(last.prompt_tokens as u64),
            count(last.cached_tokens as u64),
            milliseconds(timings.ttft_ms),
        );
        let speed = timings.decode_tok_s.map(|speed| format!(" ({speed:.1} tok/s)"));
        lines += &format!(
            "answer    {} tokens{}, ended by {}\n",
            count(last.tokens.len() as u64),
            speed.unwrap_or_default(),
            last.finish_reason.name(),
        );
        if let Some(ratio) = kv.bytes_read_ratio {
            lines += &format!("attention read {} of the bytes of dense attention", percent(ratio));
            let recall = kv.recall.map(|recall| format!("; recall {}", percent(recall)));
            let reuse = kv.reuse.map(|reuse| format!("; reuse {}", percent(reuse)));
            lines += &format!("{}{}\n", recall.unwrap_or_default(), reuse.unwrap_or_default());
        }
        if let Some(session) = self.engine.get_session_info(SESSION)? {
            let bytes_per_page = self.engine.engine().limits().bytes_per_page;
            lines += &format!(
                "session   {} turns, {} tokens; {} tokens in {} pages ({}) stay\n",
                count(session.request_count),
                count(session.total_tokens),
                count(session.cached_tokens as u64),
                count(session.cached_pages as u64),
                bytes((session.cached_pages * bytes_per_page) as u64),
            );
        }
        Ok(lines)
    }
}
