"""Questions as people write them, and what is wrong with a file of them, by row."""

import io
import json
import unicodedata

import pytest
from openpyxl import Workbook

from hashattn.base.errors import HashAttnError
from hashattn.pilot.documents import (
    Library,
    Question,
    QuestionsError,
    Skipped,
    SourceDocument,
    read_questions,
)

NAMES = ("契約書/業務ガ委託.docx", "manual.md", "a/notes.txt", "b/notes.txt", "price list.xlsx")
LIBRARY = Library(
    tuple(SourceDocument(name, "text", "txt", None, "0") for name in NAMES),
    (Skipped("scan.pdf", "no_text_layer"), Skipped("copy.md", "duplicate", {"of": "manual.md"})),
)
EXPECTED = (
    Question("期限はいつですか", ("三月末", "3月31日"), "契約書/業務ガ委託.docx", 2),
    Question("What, if any, is the price?", ("1,200",), "price list.xlsx", 3),
    Question("単価は？", (), None, 5),
)


@pytest.fixture
def write(tmp_path):
    """write(content, name): a file of questions, its path."""

    def written(content, name="q.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return written


def table(separator, quote='"'):
    """EXPECTED as CSV, with an empty fourth row."""
    texts = [
        ("質問", "回答", "備考", "文書"),
        ("期限はいつですか", "三月末|3月31日", "", "契約書/業務ガ委託.docx"),
        ("What, if any, is the price?", "1,200", "x", "price list.xlsx"),
        ("", "", "", ""),
        ("単価は？", "", "", ""),
    ]
    lines = (
        separator.join(f"{quote}{cell}{quote}" if "," in cell else cell for cell in row)
        for row in texts
    )
    return "\r\n".join(lines) + "\r\n"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "cp932", "euc_jp", "utf-16"])
def test_csv_as_excel_saves_it(write, separator, codec):
    path = write(table(separator).encode(codec))
    assert read_questions(path, LIBRARY) == EXPECTED


def test_excel(write):
    book = Workbook()
    book.active.append(["QUESTION ", "Answers", None, "File"])
    book.active.append(["期限はいつですか", "三月末 | 3月31日|", 1, "業務ガ委託.docx"])
    book.active.append(["What, if any, is the price?", "1,200", None, "Price List.xlsx"])
    book.active.append([None, "", " ", None])
    book.active.append(["単価は？"])
    book.active.append(["How many?", 42])
    file = io.BytesIO()
    book.save(file)
    questions = read_questions(write(file.getvalue(), "q.xlsx"), LIBRARY)
    assert questions == (*EXPECTED, Question("How many?", ("42",), None, 6))


@pytest.mark.parametrize("codec", ["utf-8-sig", "cp932"])
def test_json_lines(write, codec):
    lines = [
        {"question": "期限はいつですか", "answers": ["三月末", "3月31日"], "document": NAMES[0]},
        {"Question": "What, if any, is the price?", "answer": "1,200", "document": NAMES[4]},
        "",
        {"質問": "単価は？", "回答": None},
        {"question": "How many?", "answer": 42},
    ]
    text = "\n" + "\n".join(json.dumps(x, ensure_ascii=False) if x else "" for x in lines)
    questions = read_questions(write(text.encode(codec), "q.JSONL"), LIBRARY)
    assert [(q.text, q.answers, q.document) for q in questions] == [
        *((q.text, q.answers, q.document) for q in EXPECTED),
        ("How many?", ("42",), None),
    ]
    assert [q.row for q in questions] == [2, 3, 5, 6]


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("manual.md", "manual.md"),
        ("MANUAL.MD", "manual.md"),
        ("業務ガ委託.docx", NAMES[0]),
        (unicodedata.normalize("NFD", NAMES[0]), NAMES[0]),
        ("契約書\\業務ガ委託.docx", NAMES[0]),
        ("a/notes.txt", "a/notes.txt"),
    ],
)
def test_documents_as_people_name_them(write, said, name):
    (question,) = read_questions(write(f"question,document\nx,{said}\n"), LIBRARY)
    assert question.document == name


PROBLEMS = {
    "": "is empty: add a row for each question",
    "\n \n": "is empty",
    "question,answer\n": "holds no questions: add a row for each",
    "answer,document\na,manual.md\n": "row 1 has no column named question .質問.; it has: answer",
    "Where is it?\n": "row 1 has no column named question .質問.; it has: Where is it?",
    "question,answer,回答\na,b,c\n": "row 1 names two columns for the answer: delete one",
    "question,answer\n,b\nc,d\n,e\n": "row 2 has no question: .*\n  row 4 has no question",
    "question\na\nb\na\n": "row 4 asks what row 2 asks: delete one",
    "question,document\nx,manuel.md\n": "row 2: there is no document 'manuel.md': "
    "did you mean manual.md",
    "question,document\nx,%%%%\n": "there is no document '%%%%': give a file's name",
    "question,document\nx,notes.txt\n": "'notes.txt' may be a/notes.txt or b/notes.txt: give",
    "question,document\nx,scan.pdf\n": "'scan.pdf' was not read. It has no text layer .*OCR",
    "question,answer\nx,y\na, b,c\n": "row 3 has more cells than row 1 has names: put texts",
    "question\n" + "\n" * 3 + '"a\nb"\n"a\nb"\n': "row 6 asks what row 5 asks",
}


@pytest.mark.parametrize(("content", "message"), PROBLEMS.items())
def test_what_is_wrong_is_said_with_its_row(write, content, message):
    with pytest.raises(QuestionsError, match=message) as caught:
        read_questions(write(content), LIBRARY)
    assert isinstance(caught.value, HashAttnError)


def test_a_question_may_be_asked_of_two_documents(write):
    content = "question,document\nx,manual.md\nx,a/notes.txt\nx,\n"
    assert len(read_questions(write(content), LIBRARY)) == 3


def test_many_problems_are_not_all_listed(write):
    content = "question,answer\n" + ",x\n" * 30
    with pytest.raises(QuestionsError, match="row 6 has no question.*\n  and 25 more$"):
        read_questions(write(content), LIBRARY)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a"', "line 1 is not JSON"),
        ('["a"]', r"line 1 is no object: write \{"),
        ('{"question": ["a"]}', "line 1: the question must be a text"),
        ('{"question": "a", "answer": {"b": 1}}', "the answer must be a text or a list of texts"),
        ('{"answer": "a"}', "line 1 has no column named question"),
        ('{"question": "a", "question": "b"}', "given twice"),
        ('{"question": "\\ud800"}', "row 1 has no question"),
    ],
)
def test_what_is_wrong_with_json_lines(write, line, message):
    with pytest.raises(QuestionsError, match=message):
        read_questions(write(line, "q.jsonl"), LIBRARY)


def test_files_that_are_no_questions(write, tmp_path):
    with pytest.raises(QuestionsError, match="file = '.txt': must be one of .csv, .tsv, .jsonl"):
        read_questions(write("x", "q.txt"), LIBRARY)
    with pytest.raises(QuestionsError, match="none.csv: It cannot be opened .No such file"):
        read_questions(tmp_path / "none.csv", LIBRARY)
    with pytest.raises(QuestionsError, match="q.xlsx: It is not a xlsx file that can be read"):
        read_questions(write("question", "q.xlsx"), LIBRARY)
    with pytest.raises(QuestionsError, match="q.csv: It is not text but binary data"):
        read_questions(write(bytes(range(1, 256)) * 40), LIBRARY)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(QuestionsError, match="folder.csv: "):
        read_questions(tmp_path / "folder.csv", LIBRARY)
