//! Arrays as text and as the server sends them in binary.

use std::iter::Peekable;
use std::str::Chars;

/// An array literal as the server writes it: empty, with NULLs, of several dimensions, with bounds of its own.
pub fn literal(of_text: bool, number: u32) -> String {
    let (shape, number) = (number % 7, number.to_string());
    match (of_text, shape) {
        (_, 0) => "{}".to_owned(),
        (_, 1) => "{NULL}".to_owned(),
        (false, 2) => format!("{{{number},NULL,7}}"),
        (false, 3) => format!("{{{{1,{number}}},{{NULL,4}},{{5,6}}}}"),
        (false, 4) => format!("[-1:1]={{{number},2,3}}"),
        (false, 5) => format!("{{{{{{1}},{{2}}}},{{{{{number}}},{{NULL}}}}}}"),
        (false, _) => format!("{{{number}}}"),
        (true, 2) => format!(r#"{{t{number},NULL,"NULL","",ünï}}"#),
        (true, 3) => format!(r#"{{{{"a b","{{{number}}}"}},{{NULL,"x,\"y\\"}}}}"#),
        (true, 4) => format!("[3:4][0:0]={{{{a{number}}},{{b}}}}"),
        (true, 5) => format!("{{{}}}", format!("long{number}").repeat(600)),
        (true, _) => format!("{{t{number}}}"),
    }
}

/// What a literal stands for.
enum Node {
    Element(Option<String>),
    Items(Vec<Node>),
}

/// The binary form of a literal (PostgreSQL: `array_send`).
pub fn binary(literal: &str, of_text: bool) -> Vec<u8> {
    let (bounds, items) = literal.split_once('=').filter(|_| literal.starts_with('[')).unwrap_or(("", literal));
    let lower: Vec<i32> =
        bounds.split('[').skip(1).map(|bound| bound.split(':').next().expect("a bound").parse().expect("a number")).collect();
    let root = node(&mut items.chars().peekable());
    let (mut lengths, mut elements) = (Vec::new(), Vec::new());
    flatten(&root, 0, &mut lengths, &mut elements);
    if elements.is_empty() {
        lengths.clear();
    }
    let element_type: i32 = if of_text { 25 } else { 23 };
    let has_null = i32::from(elements.iter().any(Option::is_none));
    let mut bytes: Vec<u8> = [lengths.len() as i32, has_null, element_type].iter().flat_map(|number| number.to_be_bytes()).collect();
    for (dimension, length) in lengths.iter().enumerate() {
        bytes.extend((*length as i32).to_be_bytes());
        bytes.extend(lower.get(dimension).copied().unwrap_or(1).to_be_bytes());
    }
    for element in elements {
        let value = element.map(|text| match of_text {
            true => text.into_bytes(),
            false => text.parse::<i32>().expect("a number").to_be_bytes().to_vec(),
        });
        bytes.extend(value.as_ref().map_or(-1, |value| value.len() as i32).to_be_bytes());
        bytes.extend(value.unwrap_or_default());
    }
    bytes
}

fn node(chars: &mut Peekable<Chars<'_>>) -> Node {
    match chars.peek() {
        Some('{') => {
            chars.next();
            let mut items = Vec::new();
            while chars.peek() != Some(&'}') {
                items.push(node(chars));
                if chars.peek() == Some(&',') {
                    chars.next();
                }
            }
            chars.next();
            Node::Items(items)
        }
        Some('"') => {
            chars.next();
            let mut text = String::new();
            loop {
                match chars.next().expect("a closing quote") {
                    '"' => return Node::Element(Some(text)),
                    '\\' => text.push(chars.next().expect("a character")),
                    other => text.push(other),
                }
            }
        }
        _ => {
            let mut text = String::new();
            while let Some(next) = chars.next_if(|next| !matches!(next, ',' | '}')) {
                text.push(next);
            }
            Node::Element((text != "NULL").then_some(text))
        }
    }
}

fn flatten(node: &Node, depth: usize, lengths: &mut Vec<usize>, elements: &mut Vec<Option<String>>) {
    match node {
        Node::Element(element) => elements.push(element.clone()),
        Node::Items(items) => {
            if lengths.len() == depth {
                lengths.push(items.len());
            }
            items.iter().for_each(|item| flatten(item, depth + 1, lengths, elements));
        }
    }
}
