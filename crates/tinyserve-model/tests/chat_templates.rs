//! Chat templates against what transformers renders, and against what is wrong with them.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use tinyserve_model::{
    BUILTIN_MODEL, ChatInput, ChatMessage, ChatTemplate, Checkpoint, TemplateMap, TemplateValue,
};

#[derive(Deserialize)]
struct Golden {
    chats: BTreeMap<String, Vec<ChatMessage>>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    chat: String,
    #[serde(default)]
    add_generation_prompt: bool,
    #[serde(default)]
    continue_final_message: bool,
    tools: Option<TemplateValue>,
    arguments: Option<TemplateMap>,
    text: Option<String>,
    error: Option<String>,
}

fn file(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chat_templates").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn template(source: &str) -> ChatTemplate {
    let special = [("bos_token", "<s>".to_owned()), ("eos_token", "</s>".to_owned())];
    ChatTemplate::new("t.jinja", source, special).unwrap()
}

fn user(text: &str) -> Vec<ChatMessage> {
    vec![ChatMessage::new("user", text)]
}

#[test]
fn prompts_are_those_of_transformers() {
    let golden: Golden = serde_json::from_str(&file("golden.json")).unwrap();
    assert!(golden.cases.len() > 250);
    for case in &golden.cases {
        let found = template(&file(&case.template)).render(ChatInput {
            messages: &golden.chats[&case.chat],
            tools: case.tools.as_ref(),
            add_generation_prompt: case.add_generation_prompt,
            continue_final_message: case.continue_final_message,
            arguments: case.arguments.as_ref(),
        });
        let name = format!("{} of {}", case.chat, case.template);
        match (&case.text, &case.error, found) {
            (Some(expected), _, Ok(found)) => assert_eq!(&found, expected, "{name}"),
            (None, Some(expected), Err(found)) => {
                let found = found.to_string();
                // What a template says itself is passed on word by word.
                let (kind, words) = expected.split_once(": ").unwrap();
                assert!(kind != "TemplateError" || found.ends_with(words), "{name}: {found}");
            }
            (_, _, found) => panic!("{name}: {found:?}, expected {:?}", case.text),
        }
    }
}

#[test]
fn checkpoints_bring_their_template_in_any_of_three_files() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/stories260k").join(name);
        std::fs::copy(from, folder.path().join(name)).unwrap();
    }
    let render = |input: ChatInput<'_>| {
        let checkpoint = Checkpoint::load(folder.path().to_str().unwrap()).unwrap();
        let template = checkpoint.chat_template();
        template.map(|template| template.map(|template| template.render(input).unwrap()))
    };
    let messages = user("Hi");
    let input = ChatInput { messages: &messages, ..ChatInput::default() };
    assert_eq!(render(input).unwrap(), None);

    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write(
        "tokenizer_config.json",
        r#"{"bos_token": {"content": "[B]"}, "chat_template": [
            {"name": "default", "template": "{{ bos_token }}{{ eos_token }}{{ messages[0].content }}"},
            {"name": "tool_use", "template": "tools{{ tools }}"}]}"#,
    );
    assert_eq!(render(input).unwrap().unwrap(), "[B]</s>Hi");
    let tools = TemplateValue::from(3);
    assert_eq!(render(ChatInput { tools: Some(&tools), ..input }).unwrap().unwrap(), "tools3");
    write("chat_template.json", r#"{"chat_template": "json {{ messages[0].content }}"}"#);
    assert_eq!(render(input).unwrap().unwrap(), "json Hi");
    write("chat_template.jinja", "jinja {{ messages[0].content }}\n");
    assert_eq!(render(input).unwrap().unwrap(), "jinja Hi");

    write("chat_template.jinja", "{% if %}");
    let error = render(input).unwrap_err().to_string();
    assert!(error.contains("chat_template.jinja: syntax error in line 1"), "{error}");
    std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
    write("chat_template.json", r#"{"chat_template": [{"name": "other", "template": ""}]}"#);
    let error = render(input).unwrap_err().to_string();
    assert!(error.contains("chat_template.json: chat_template is [{"), "{error}");
}

#[test]
fn the_built_in_model_goes_on_with_what_was_said() {
    let template = Checkpoint::load(BUILTIN_MODEL).unwrap().chat_template().unwrap().unwrap();
    let messages =
        [ChatMessage::new("system", "Tell a story."), ChatMessage::new("user", "Once upon a time")];
    let input =
        ChatInput { messages: &messages, add_generation_prompt: true, ..Default::default() };
    assert_eq!(template.render(input).unwrap(), "<s>Tell a story.\nOnce upon a time");
}

#[test]
fn what_cannot_be_rendered_is_refused_in_one_sentence() {
    let messages = user("Hi");
    let input = ChatInput { messages: &messages, ..ChatInput::default() };
    let refused = |source: &str, input: ChatInput<'_>| {
        let error = template(source).render(input).unwrap_err().to_string();
        assert!(error.starts_with("the chat template t.jinja: "), "{error}");
        assert!(!error.contains('\n'), "{error}");
        error
    };
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}";
    assert!(refused(endless, input).ends_with("it runs too long"));
    assert!(refused("{{ raise_exception('no!') }}", input).ends_with(": no!"));
    assert!(refused("{{ nothing() }}", input).contains("line 1"));
    refused("{{ strftime_now('%!') }}", input);
    refused("", ChatInput { messages: &[], ..input });
    let continues = ChatInput { continue_final_message: true, ..input };
    assert!(refused("nothing", continues).contains("leaves out the message"));
    refused("", ChatInput { add_generation_prompt: true, ..continues });
    let silent = [ChatMessage { content: None, ..messages[0].clone() }];
    assert!(refused("", ChatInput { messages: &silent, ..continues }).contains("no content"));
}

#[test]
fn templates_reach_no_files() {
    let messages = user("Hi");
    let input = ChatInput { messages: &messages, ..ChatInput::default() };
    for source in
        ["{% include '/etc/passwd' %}", "{% extends 'Cargo.toml' %}", "{% import 'x' as x %}"]
    {
        template(source).render(input).unwrap_err();
    }
    // A client's text is text, never a template.
    let messages = user("{{ 1 + 1 }}{% raw %}");
    let input = ChatInput { messages: &messages, ..ChatInput::default() };
    assert_eq!(
        template("{{ messages[0].content }}").render(input).unwrap(),
        "{{ 1 + 1 }}{% raw %}"
    );
}

#[test]
fn today_has_the_form_that_is_asked_for() {
    let messages = user("Hi");
    let input = ChatInput { messages: &messages, ..ChatInput::default() };
    let day = template("{{ strftime_now('%d %b %Y') }}").render(input).unwrap();
    let parts: Vec<&str> = day.split(' ').collect();
    assert!(parts.len() == 3 && parts[0].len() == 2 && parts[2].parse::<u32>().is_ok(), "{day}");
}
