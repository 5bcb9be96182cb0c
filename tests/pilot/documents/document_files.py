"""Small files of each kind, most of them written byte by byte."""

import hashlib
import io
import zipfile
from html import escape

W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
R = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
TYPES = (
    f'<Types xmlns="{PACKAGE}/content-types">'
    '<Default Extension="rels" '
    'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Default Extension="xml" ContentType="application/xml"/>{}</Types>'
)
_PADDING = bytes.fromhex("28bf4e5e4e758a4164004e56fffa01082e2e00b6d0683e802f0ca9fe6453697a")
PLAIN_FONT = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
JAPANESE_FONT = (
    "<< /Type /Font /Subtype /Type0 /BaseFont /Mincho /Encoding /UniJIS-UTF16-H "
    "/DescendantFonts [<< /Type /Font /Subtype /CIDFontType0 /BaseFont /Mincho /CIDSystemInfo "
    "<< /Registry (Adobe) /Ordering (Japan1) /Supplement 2 >> /FontDescriptor << /Type "
    "/FontDescriptor /FontName /Mincho /Flags 4 /FontBBox [0 0 1000 1000] /ItalicAngle 0 "
    "/Ascent 800 /Descent -200 /CapHeight 700 /StemV 80 >> >>] >>"
)


def zipped(parts):
    """A zip archive of {name: content}."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return file.getvalue()


def relationships(*targets):
    """A part of (kind, target) relationships."""
    lines = (
        f'<Relationship Id="r{n}" Type="{R}/{kind}" Target="{target}"/>'
        for n, (kind, target) in enumerate(targets)
    )
    return f'<Relationships xmlns="{PACKAGE}/relationships">{"".join(lines)}</Relationships>'


def docx(body, prolog="", **parts):
    """A Word document of the XML inside <w:body>; prolog: before the root."""
    styles = "".join(
        f'<w:style w:type="paragraph" w:styleId="{i}"><w:name w:val="{name}"/></w:style>'
        for i, name in (("Heading1", "heading 1"), ("Heading2", "heading 2"), ("Title", "Title"))
    )
    numbering = (
        '<w:abstractNum w:abstractNumId="0"><w:lvl w:ilvl="0"><w:numFmt w:val="bullet"/></w:lvl>'
        '</w:abstractNum><w:num w:numId="1"><w:abstractNumId w:val="0"/></w:num>'
    )
    return zipped({
        "[Content_Types].xml": TYPES.format(""),
        "_rels/.rels": relationships(("officeDocument", "word/document.xml")),
        "word/_rels/document.xml.rels": relationships(
            ("styles", "styles.xml"), ("numbering", "numbering.xml")
        ),
        "word/document.xml": f'{prolog}<w:document xmlns:w="{W}"><w:body>{body}</w:body>'
        "</w:document>",
        "word/styles.xml": f'<w:styles xmlns:w="{W}">{styles}</w:styles>',
        "word/numbering.xml": f'<w:numbering xmlns:w="{W}">{numbering}</w:numbering>',
    } | parts)  # fmt: skip


def paragraph(text, style="", listed=False):
    """A paragraph of a Word document."""
    properties = f'<w:pStyle w:val="{style}"/>' if style else ""
    if listed:
        properties += '<w:numPr><w:ilvl w:val="0"/><w:numId w:val="1"/></w:numPr>'
    return f"<w:p><w:pPr>{properties}</w:pPr><w:r><w:t>{escape(text)}</w:t></w:r></w:p>"


def xlsx(sheet, prolog="", claims=""):
    """A workbook of one sheet, given as the XML inside <sheetData>; claims: the cells it says that
    it has."""
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    dimension = f'<dimension ref="{claims}"/>' if claims else ""
    sheets = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    return zipped({
        "[Content_Types].xml": TYPES.format(
            f'<Override PartName="/xl/workbook.xml" ContentType="{sheets}.sheet.main+xml"/>'
            f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{sheets}.worksheet+xml"/>'
        ),
        "_rels/.rels": relationships(("officeDocument", "xl/workbook.xml")),
        "xl/_rels/workbook.xml.rels": relationships(("worksheet", "worksheets/sheet1.xml")),
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{R}"><sheets>'
        '<sheet name="Prices" sheetId="1" r:id="r0"/></sheets></workbook>',
        "xl/worksheets/sheet1.xml": f'{prolog}<worksheet xmlns="{main}">{dimension}<sheetData>'
        f"{sheet}</sheetData></worksheet>",
    })  # fmt: skip


def cell(place, text, formula=""):
    """A cell of a sheet: a text, or a formula with the value that was stored."""
    if formula:
        stored = f"<v>{text}</v>" if text else ""
        return f'<c r="{place}"><f>{formula}</f>{stored}</c>'
    return f'<c r="{place}" t="inlineStr"><is><t>{escape(text)}</t></is></c>'


def pdf(*pages, password=None):
    """A PDF of pages of lines, 14 points apart; a page None is a picture. Japanese text stands in a
    font of Adobe's Japan1. password: encrypts it (RC4, 40 bits), without a password for the owner.
    """
    objects = ["", PLAIN_FONT, JAPANESE_FONT]
    kids = []
    for lines in pages:
        if lines is None:
            objects.append(
                ("<< /Type /XObject /Subtype /Image /Width 2 /Height 2 /BitsPerComponent 8 "
                 "/ColorSpace /DeviceGray", b"\0\xff\xff\0")
            )  # fmt: skip
            content, picture = (
                b"q 200 0 0 200 72 400 cm /X Do Q",
                f"/XObject << /X {len(objects) + 1} 0 R >>",
            )
        else:
            content, picture = b"".join(map(_drawn, enumerate(lines))), ""
        objects.append(("<<", content))
        kids.append(len(objects) + 2)
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F0 3 0 R "
            f"/F1 4 0 R >> {picture} >> /Contents {len(objects) + 1} 0 R >>"
        )
    objects[0] = (
        f"<< /Type /Pages /Kids [{' '.join(f'{k} 0 R' for k in kids)}] /Count {len(kids)} >>"
    )
    return _assembled(["<< /Type /Catalog /Pages 2 0 R >>", *objects], password)


def _drawn(numbered):
    number, line = numbered
    font, code = (0, line.encode("latin-1")) if line.isascii() else (1, line.encode("utf-16-be"))
    place = f"BT /F{font} 10 Tf 1 0 0 1 40 {760 - 14 * number} Tm <{code.hex()}> Tj ET\n"
    return place.encode()


def _assembled(objects, password):
    key, extra = None, ""
    if password is not None:
        key, extra = _encryption(password)
    out, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        places.append(len(out))
        if isinstance(each, tuple):
            head, content = each
            if key:
                salted = hashlib.md5(key + number.to_bytes(3, "little") + b"\0\0").digest()
                content = rc4(salted[: len(key) + 5], content)
            each = f"{head} /Length {len(content)} >>\nstream\n".encode() + content + b"\nendstream"
        else:
            each = each.encode()
        out += f"{number} 0 obj\n".encode() + each + b"\nendobj\n"
    start, size = len(out), len(objects) + 1
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    out += f"xref\n0 {size}\n0000000000 65535 f \n{table}".encode()
    out += f"trailer\n<< /Size {size} /Root 1 0 R {extra}>>\n".encode()
    return out + f"startxref\n{start}\n%%EOF\n".encode()


def _encryption(password):
    """(key, entries of the trailer) of PDF's standard security handler, revision 2."""
    padded = (password.encode() + _PADDING)[:32]
    owner = rc4(hashlib.md5(padded).digest()[:5], padded)
    permissions, name = -4, b"0123456789abcdef"
    signed = permissions.to_bytes(4, "little", signed=True)
    key = hashlib.md5(padded + owner + signed + name).digest()[:5]
    return key, (
        f"/ID [<{name.hex()}> <{name.hex()}>] /Encrypt << /Filter /Standard /V 1 /R 2 "
        f"/O <{owner.hex()}> /U <{rc4(key, _PADDING).hex()}> /P {permissions} >> "
    )


def rc4(key, content):
    state, j, out = list(range(256)), 0, bytearray()
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    i = j = 0
    for byte in content:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)


def pptx_file(slides):
    """A presentation of (title, [lines], notes) slides."""
    from pptx import Presentation

    presentation = Presentation()
    for title, lines, notes in slides:
        slide = presentation.slides.add_slide(presentation.slide_layouts[1])
        slide.shapes.title.text = title
        slide.placeholders[1].text = "\n".join(lines)
        if notes:
            slide.notes_slide.notes_text_frame.text = notes
    file = io.BytesIO()
    presentation.save(file)
    return file.getvalue()
