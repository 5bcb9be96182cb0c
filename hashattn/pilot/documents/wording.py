"""Sentences about files that were not read, or not all of them, by key: what is wrong, what to do.

`{...}`: values of a `Skipped`.
"""

SENTENCES: dict[str, dict[str, str]] = {
    "en": {
        # nothing was read
        "archive": "An archive ({suffix}, {count} in all): unpack it into the folder.",
        "bomb": "It would unpack to more than {megabytes:.0f} MB, as files made to do harm do: "
        "leave it out, or split it.",
        "crashed": "The library that reads it crashed or ran out of memory: open the file and save "
        "it again, or save its text.",
        "damaged": "It is not a {kind} file that can be read, so it is damaged or named wrongly: "
        "open it and save it again.",
        "documents_limit": "{count} more documents were not read, as {limit} are read at most: "
        "choose fewer, or raise ReadLimits.documents.",
        "duplicate": "It has the same content as {of}, which stands for both: nothing to do.",
        "empty": "It holds no text: nothing to do if that is right.",
        "encrypted": "It is protected by a password: save a copy without one.",
        "encrypted_office": "It is protected by a password, or in the old Office format: save a "
        "copy as {suffix} without a password.",
        "entities": "Its XML declares entities, which Office never writes: take another copy.",
        "files_limit": "Only {limit} files were looked at: choose a smaller folder, or raise "
        "ReadLimits.files.",
        "hidden": "Hidden files and folders, and lock files of Office ({count} in all), were left "
        "out: nothing to do.",
        "memory": "Reading it needs more than {megabytes:.0f} MB of memory: split it, or raise "
        "ReadLimits.memory_bytes.",
        "no_text_layer": "It has no text layer (it is a scan or a picture): OCR it first.",
        "not_text": "It is not text but binary data: save it as one of {kinds}.",
        "old_format": "A format that is not read ({suffix}, {count} in all): save it as {save_as}.",
        "questions": "It holds the questions that are asked: nothing to do.",
        "special": "It is a pipe, socket or device and was not opened: nothing to do.",
        "symlink": "It is a symbolic link and was not followed: copy what it points to into the "
        "folder.",
        "timeout": "Reading it took more than {seconds:g} s: split it, or raise "
        "ReadLimits.seconds.",
        "too_large": "It is larger than {megabytes:.0f} MB: split it, or raise "
        "ReadLimits.file_bytes.",
        "total_characters": "{count} more documents were not read, as {limit} characters in all "
        "are read at most: choose fewer, or raise ReadLimits.total_characters.",
        "total_seconds": "{count} more documents were not read, as reading took more than "
        "{seconds:g} s in all: choose fewer, or raise ReadLimits.total_seconds.",
        "unknown_suffix": "A kind that is not read ({suffix}, {count} in all): save it as one of "
        "{kinds} if it holds text.",
        "unreadable": "It cannot be opened ({problem}): change its permissions, or take another "
        "copy.",
        # a part was not read
        "cut": "Only its first {characters} characters were read: split it, or raise "
        "ReadLimits.characters.",
        "damaged_text": "{count} characters of it are damaged and stand as U+FFFD: take another "
        "copy if they matter.",
        "formulas": "{count} of its formulas have no stored value and were left out: open it in "
        "Excel and save it.",
        "picture_pages": "{count} of its {of} pages are pictures without text and were left out: "
        "OCR them first.",
    },
    "ja": {
        "archive": "書庫です({suffix}、計 {count} 個)。展開してフォルダーに入れてください。",
        "bomb": "展開すると {megabytes:.0f} MB を超えます(悪意のあるファイルによくある形です)。"
        "除くか、分割してください。",
        "crashed": "読み取りライブラリが異常終了したか、メモリーが足りません。"
        "開いて保存し直すか、テキストで保存してください。",
        "damaged": "{kind} ファイルとして読めません。壊れているか、拡張子が違います。"
        "開いて保存し直してください。",
        "documents_limit": "文書は最大 {limit} 件のため、さらに {count} 件を読みませんでした。"
        "減らすか、ReadLimits.documents を大きくしてください。",
        "duplicate": "{of} と内容が同じため、そちらだけを使います。対応は不要です。",
        "empty": "文字がありません。意図どおりなら対応は不要です。",
        "encrypted": "パスワードで保護されています。パスワードなしの写しを保存してください。",
        "encrypted_office": "パスワードで保護されているか、古い Office 形式です。"
        "パスワードなしの {suffix} で保存してください。",
        "entities": "XML に、Office が書かない実体宣言があります。別の写しを使ってください。",
        "files_limit": "調べたのは {limit} ファイルまでです。小さいフォルダーを選ぶか、"
        "ReadLimits.files を大きくしてください。",
        "hidden": "隠しファイル・隠しフォルダーと Office のロックファイル、計 {count} 個を"
        "除きました。対応は不要です。",
        "memory": "読むのに {megabytes:.0f} MB を超えるメモリーが要ります。分割するか、"
        "ReadLimits.memory_bytes を大きくしてください。",
        "no_text_layer": "文字情報がありません(スキャンまたは画像です)。"
        "先に OCR にかけてください。",
        "not_text": "テキストではなくバイナリーデータです。{kinds} のいずれかで保存してください。",
        "old_format": "読めない形式です({suffix}、計 {count} 個)。{save_as} で保存してください。",
        "questions": "質問のファイルなので、文書としては読みません。対応は不要です。",
        "special": "パイプ、ソケットまたはデバイスのため、開きませんでした。対応は不要です。",
        "symlink": "シンボリックリンクのため、たどりませんでした。"
        "リンク先をフォルダーにコピーしてください。",
        "timeout": "読むのに {seconds:g} 秒を超えました。分割するか、"
        "ReadLimits.seconds を大きくしてください。",
        "too_large": "{megabytes:.0f} MB を超えます。分割するか、"
        "ReadLimits.file_bytes を大きくしてください。",
        "total_characters": "読むのは合計 {limit} 文字までのため、さらに {count} 件を"
        "読みませんでした。減らすか、ReadLimits.total_characters を大きくしてください。",
        "total_seconds": "合計 {seconds:g} 秒を超えたため、さらに {count} 件を読みませんでした。"
        "減らすか、ReadLimits.total_seconds を大きくしてください。",
        "unknown_suffix": "読めない種類です({suffix}、計 {count} 個)。"
        "文書なら {kinds} のいずれかで保存してください。",
        "unreadable": "開けません({problem})。権限を変えるか、別の写しを使ってください。",
        "cut": "先頭の {characters} 文字だけを読みました。分割するか、"
        "ReadLimits.characters を大きくしてください。",
        "damaged_text": "{count} 文字が壊れており、U+FFFD に置き換えました。"
        "重要なら別の写しを使ってください。",
        "formulas": "{count} 個の数式に計算結果が保存されておらず、除きました。"
        "Excel で開いて保存してください。",
        "picture_pages": "{of} ページのうち {count} ページは文字のない画像で、除きました。"
        "先に OCR にかけてください。",
    },
}
